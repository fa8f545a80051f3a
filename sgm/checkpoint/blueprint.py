"""The models that weights are compared with before they are converted, built without memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgm.checkpoint.diffusers_configs import Geometry, transformer_sizes, vae_sizes
from sgm.checkpoint.fit import check_fit
from sgm.checkpoint.table import Part, on_meta, to_diffusers
from sgm.checkpoint.transformer import POSITION_TABLE
from sgm.errors import UserError
from sgm.util import instantiate_from_config

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
    metas = on_meta(to_diffusers(on_meta(tensors), part, where=where))
    return (transformer_sizes if part == "transformer" else vae_sizes)(metas, where)


def build_on_meta(node: Mapping[str, Any]) -> nn.Module:
    """The transformer or autoencoder of a node of the configuration, without values.

    Raises:
        UserError: the node is wrong.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("params"), Mapping):
        raise UserError(
            "the configuration lacks network_config or first_stage_config with params, which say "
            "what the weights cannot; name a whole configuration with --base"
        )
    params = {key: value for key, value in node["params"].items() if key != "ckpt_path"}
    with torch.device("meta"):
        return instantiate_from_config({**node, "params": params})


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
    wanted = model.state_dict()
    if POSITION_TABLE not in tensors:
        wanted = without_positions(wanted)
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


def geometry_of(network: Mapping[str, Any]) -> Geometry:
    """What the params of `network_config` say that weights cannot; they have been built once.

    Raises:
        UserError: diffusers cannot express it.
    """
    position = network["modules"]["pos_embed_config"]["params"]
    factors = [position.get(f"{side}_interpolation", 1.0) for side in ("height", "width")]
    if factors[0] != factors[1]:
        raise UserError(
            f"height_interpolation={factors[0]} and width_interpolation={factors[1]} differ; "
            "diffusers has one factor for both, so this model cannot be converted"
        )
    return Geometry(
        latent_height=network["latent_height"],
        latent_width=network["latent_width"],
        num_frames=network["num_frames"],
        time_compressed_rate=network["time_compressed_rate"],
        text_length=position["text_length"],
        interpolation=float(factors[0]),
    )


def check_complete(
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
                f"{where} has {key}={value}, but its config.json says {config[key]}; copy both "
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
