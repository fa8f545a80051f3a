"""The sizes that weights show, models of such sizes on the meta device, and whether both agree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sgm.checkpoint.strict_loading import check_fit
from sgm.checkpoint.table import POSITION_TABLE, Part, to_diffusers
from sgm.checkpoint.tensors import on_meta
from sgm.errors import UserError
from sgm.util import build_on_meta

_MOST_LAYERS = 200  # no model of this kind comes near, while a damaged file may claim any number


def sizes_of(tensors: Mapping[str, Tensor], part: Part, where: str | Path) -> dict[str, Any]:
    """Sizes that the weights of a part tell, by the keys of diffusers' config.json.

    Args:
        tensors: names as in SAT.
        part: transformer or vae.
        where: the file, for messages.

    Raises:
        UserError: names or shapes are not those of the part.
    """
    metas = to_diffusers(on_meta(tensors), part, where=where)
    return (_transformer_sizes if part == "transformer" else _vae_sizes)(metas, where)


def _shape(metas: Mapping[str, Tensor], name: str, where: str | Path, *, ndim: int) -> list[int]:
    if name not in metas or metas[name].ndim != ndim:
        raise UserError(f"{where} is damaged or of another model: {name} is absent or misshapen")
    return list(metas[name].shape)


def _count(names: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers there are, 0 … the largest that matches the group of `pattern`."""
    found = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _transformer_sizes(metas: Mapping[str, Tensor], where: str | Path) -> dict[str, int]:
    """Sizes of a transformer, by the keys of its config.json.

    Args:
        metas: diffusers' name → tensor, which may be on the meta device.
        where: the file, for messages.

    Raises:
        UserError: a tensor that tells a size is absent.
    """
    width, channels, patch, _ = _shape(metas, "patch_embed.proj.weight", where, ndim=4)
    (head,) = _shape(metas, "transformer_blocks.0.attn1.norm_q.weight", where, ndim=1)
    _, text_width = _shape(metas, "patch_embed.text_proj.weight", where, ndim=2)
    time_width, _ = _shape(metas, "time_embedding.linear_1.weight", where, ndim=2)
    outputs, _ = _shape(metas, "proj_out.weight", where, ndim=2)
    if 0 in (head, patch):
        raise UserError(f"{where} is damaged: it holds tensors without elements")
    return {
        "num_layers": _count(metas, r"transformer_blocks\.(\d+)\."),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": outputs // patch**2,
        "patch_size": patch,
        "text_embed_dim": text_width,
        "time_embed_dim": time_width,
    }


def _vae_sizes(metas: Mapping[str, Tensor], where: str | Path) -> dict[str, Any]:
    """Sizes of an autoencoder, by the keys of its config.json; arguments as above."""

    def width(name: str, axis: int = 0) -> int:
        return _shape(metas, f"{name}.weight", where, ndim=5)[axis]

    num_levels = _count(metas, r"encoder\.down_blocks\.(\d+)\.")
    return {
        "block_out_channels": [
            width(f"encoder.down_blocks.{level}.resnets.0.conv1.conv")
            for level in range(num_levels)
        ],
        "layers_per_block": _count(metas, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": width("decoder.conv_in.conv", 1),
        "in_channels": width("encoder.conv_in.conv", 1),
        "out_channels": width("decoder.conv_out.conv"),
    }


def model_of(sizes: Mapping[str, Any], part: Part, *, where: str | Path) -> nn.Module:
    """The transformer or autoencoder of `sizes`, as `sizes_of` gives them, on the meta device.

    Raises:
        UserError: no model can have them.
    """
    counts = [n for size in sizes.values() for n in (size if isinstance(size, list) else [size])]
    layers = sizes["num_layers" if part == "transformer" else "layers_per_block"]
    try:
        if min(counts) < 1 or layers > _MOST_LAYERS:
            raise ValueError
        return _transformer_of(sizes) if part == "transformer" else _vae_of(sizes)
    except (UserError, ValueError, ArithmeticError, LookupError, RuntimeError, AssertionError):
        told = ", ".join(f"{key}={value}" for key, value in sizes.items())
        raise UserError(
            f"{where} is damaged or of another model: no CogVideoX-2B has {told}"
        ) from None


def _transformer_of(sizes: Mapping[str, int]) -> nn.Module:
    """A transformer of these sizes on the meta device; its clips are as short as can be."""
    parts = "sgm.modules.transformer"
    modules = {
        "pos_embed_config": {
            "target": f"{parts}.position_embedding.Basic3DPositionEmbeddingMixin",
            "params": {"text_length": 1},
        },
        "patch_embed_config": {
            "target": f"{parts}.patch_embedding.ImagePatchEmbeddingMixin",
            "params": {"text_hidden_size": sizes["text_embed_dim"]},
        },
        "adaln_layer_config": {
            "target": f"{parts}.adaln.AdaLNMixin",
            "params": {"qk_ln": True},
        },
        "final_layer_config": {"target": f"{parts}.final_layer.FinalLayerMixin"},
    }
    params = {
        "num_layers": sizes["num_layers"],
        "hidden_size": sizes["num_attention_heads"] * sizes["attention_head_dim"],
        "num_attention_heads": sizes["num_attention_heads"],
        "in_channels": sizes["in_channels"],
        "out_channels": sizes["out_channels"],
        "patch_size": sizes["patch_size"],
        "latent_height": sizes["patch_size"],
        "latent_width": sizes["patch_size"],
        "num_frames": 1,
        "time_compressed_rate": 4,
        "time_embed_dim": sizes["time_embed_dim"],
        "modules": modules,
    }
    return build_on_meta(
        {"target": "sgm.models.transformer.DiffusionTransformer", "params": params}
    )


def _vae_of(sizes: Mapping[str, Any]) -> nn.Module:
    """An autoencoder of these sizes on the meta device; its widths are multiples of the first."""
    widths = sizes["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ValueError
    node = {
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": sizes["layers_per_block"],
        "z_channels": sizes["latent_channels"],
        "in_channels": sizes["in_channels"],
        "out_ch": sizes["out_channels"],
    }
    parts = "sgm.modules.autoencoding"
    params = {
        "encoder_config": {
            "target": f"{parts}.encoder.ContextParallelEncoder3D",
            "params": node,
        },
        "decoder_config": {
            "target": f"{parts}.decoder.ContextParallelDecoder3D",
            "params": node,
        },
        "regularizer_config": {"target": f"{parts}.regularizers.DiagonalGaussianRegularizer"},
    }
    return build_on_meta(
        {"target": "sgm.models.autoencoder.VideoAutoencoderInferenceWrapper", "params": params}
    )


def check_weights(
    tensors: Mapping[str, Tensor],
    part: Part,
    model: nn.Module,
    *,
    where: str | Path,
    described_by: str,
) -> dict[str, Any]:
    """Compare the weights of a part with the model of a configuration; their sizes.

    Args:
        tensors: names as in SAT; the position table may be absent.
        part: transformer or vae.
        model: on the meta device.
        where: the file, for messages.
        described_by: the configuration, for messages.

    Raises:
        UserError: sizes differ, or names or shapes are absent or too many.
    """
    wanted = wanted_of(model.state_dict(), tensors)
    found, expected = sizes_of(tensors, part, where), sizes_of(wanted, part, described_by)
    for key, value in found.items():
        if value != expected[key]:
            raise UserError(
                f"{where} has {key}={value}, but {described_by} describes a model with {key}="
                f"{expected[key]}; name the configuration of these weights with --base"
            )
    hint = f"copy the file again, or name its configuration instead of {described_by} with --base"
    check_fit(on_meta(tensors), wanted, path=where, hint=hint)
    return found


def check_whole_part(
    tensors: Mapping[str, Tensor], part: Part, config: Mapping[str, Any], *, where: str | Path
) -> dict[str, Any]:
    """Check that weights of diffusers are those of a whole CogVideoX-2B of any size; their sizes.

    Args:
        tensors: under SAT's names.
        part: transformer or vae.
        config: diffusers' config.json; sizes that it has must be those of the weights.
        where: the folder, for messages.

    Raises:
        UserError: config.json says other sizes, or names or shapes are absent or too many.
    """
    sizes = sizes_of(tensors, part, where)
    for key, value in sizes.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{where} has {key}={value}, but its config.json says {config[key]!r}; copy both "
                "from the original again"
            )
    check_fit(
        without_positions(on_meta(tensors)),
        without_positions(model_of(sizes, part, where=where).state_dict()),
        path=where,
        model="a model of its sizes",
        hint="copy it from the original again",
    )
    return sizes


def without_positions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but the position table, which is computed where it is absent; clips tell its size."""
    return {name: tensor for name, tensor in tensors.items() if name != POSITION_TABLE}


def wanted_of(model: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model wants of weights: its position table only where they have one."""
    return dict(model) if POSITION_TABLE in found else without_positions(model)
