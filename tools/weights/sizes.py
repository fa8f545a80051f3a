"""Derive a model's sizes from its weights, and expected weights from sizes or configurations."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from sgm.checkpoint.strict_loading import differences
from sgm.checkpoint.table import POSITION_TABLE, Part
from sgm.checkpoint.tensors import on_meta
from sgm.errors import UserError
from sgm.util import build_on_meta
from tools.launch.choose_config import BUNDLED, FULL
from tools.weights.sources import ROOT, read_config

SHIPPED = (FULL, BUNDLED)  # paths of configurations in the repository
_NODES = {"transformer": "network_config", "vae": "first_stage_config"}
_MOST_LAYERS = 200  # more than any such model has; names in a damaged file may imply more


def sizes_of(tensors: Mapping[str, Tensor], part: Part, where: str | Path) -> dict[str, Any]:
    """Return the sizes of a part, with the keys of diffusers' config.json, from its weights.

    Args:
        tensors: the part's tensors, with SAT's names.
        part: transformer or vae.
        where: the file, for messages.

    Raises:
        UserError: a weight that a size is read from is missing or has a wrong number of dimensions.
    """
    metas = on_meta(tensors)

    def shape(name: str, ndim: int) -> list[int]:
        tensor = metas.get(f"{name}.weight")
        if tensor is None or tensor.ndim != ndim:
            raise UserError(
                f"{where} is damaged or of another model: {name}.weight is missing or does not "
                f"have {ndim} dimensions"
            )
        return list(tensor.shape)

    def count(beginning: str) -> int:
        found = (re.match(rf"{beginning}\.([0-9]{{1,4}})\.", name) for name in metas)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    if part == "vae":
        levels = range(count(r"encoder\.down"))
        widths = [shape(f"encoder.down.{level}.block.0.conv1.conv", 5)[0] for level in levels]
        return {
            "block_out_channels": widths,
            "layers_per_block": count(r"encoder\.down\.0\.block"),
            "latent_channels": shape("decoder.conv_in.conv", 5)[1],
            "in_channels": shape("encoder.conv_in.conv", 5)[1],
            "out_channels": shape("decoder.conv_out.conv", 5)[0],
        }
    width, channels, patch, _ = shape("mixins.patch_embed.proj", 4)
    (head,) = shape("mixins.adaln_layer.query_layernorm_list.0", 1)
    return {
        "num_layers": count(r"transformer\.layers"),
        "num_attention_heads": width // max(head, 1),
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": shape("mixins.final_layer.linear", 2)[0] // max(patch, 1) ** 2,
        "patch_size": patch,
        "text_embed_dim": shape("mixins.patch_embed.text_proj", 2)[1],
        "time_embed_dim": shape("time_embed.0", 2)[0],
    }


def check_sizes(
    sizes: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    where: str | Path,
    described_by: str,
    hint: str,
) -> None:
    """Check that the sizes of weights are the expected ones.

    Args:
        sizes: the sizes of the weights, as returned by `sizes_of`.
        expected: the expected sizes. Keys with the value None and unknown keys are ignored, and
            keys may be missing.
        where: the file of the weights, for the message.
        described_by: the source of the expected sizes, for the message.
        hint: what the user can do; the end of the message.

    Raises:
        UserError: a size differs.
    """
    for key, size in sizes.items():
        if expected.get(key) not in (None, size):
            raise UserError(
                f"{where} has {key}={size}, but {described_by} says {key}={expected[key]!r}; {hint}"
            )


@cache
def shipped_shapes(name: str, part: Part) -> Mapping[str, Tensor]:
    """Return name → meta tensor of a part of the configuration `name`, one of `SHIPPED`."""
    return build_on_meta(read_config(ROOT / name).model[_NODES[part]]).state_dict()


def fitting_config(tensors: Mapping[str, Tensor], part: Part) -> str | None:
    """Return the first configuration in `SHIPPED` that loads `tensors` unchanged, or None."""
    metas = on_meta(tensors)
    for name in SHIPPED:
        if not any(differences(metas, needed(shipped_shapes(name, part), metas)).values()):
            return name
    return None


def needed(model: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the weights of `model`, without the position table if it is not in `found`."""
    return model if POSITION_TABLE in found else without_positions(model)


def without_positions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` without the position table, which is computed if a file does not have it."""
    return {name: tensor for name, tensor in tensors.items() if name != POSITION_TABLE}


def weights_of(sizes: Mapping[str, Any], part: Part, *, where: str | Path) -> dict[str, Tensor]:
    """Return name → meta tensor of a part with these sizes, without the position table.

    Args:
        sizes: the sizes of the part, as returned by `sizes_of`.
        part: transformer or vae.
        where: the file with weights of these sizes, for messages.

    Raises:
        UserError: a model with these sizes is not possible.
    """
    counts = [n for size in sizes.values() for n in (size if isinstance(size, list) else [size])]
    layers = sizes["num_layers" if part == "transformer" else "layers_per_block"]
    try:
        if min(counts) < 1 or layers > _MOST_LAYERS:
            raise ValueError
        return without_positions(build_on_meta(_node_of(sizes, part)).state_dict())
    except (UserError, ValueError, ArithmeticError, LookupError, RuntimeError, AssertionError):
        given = ", ".join(f"{key}={value}" for key, value in sizes.items())
        raise UserError(
            f"{where} is damaged or of another model: no CogVideoX-2B has {given}"
        ) from None


def _node_of(sizes: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """Return the 2B model's configuration of a part with new sizes and the smallest clips."""
    node = copy.deepcopy(read_config(ROOT / FULL).model[_NODES[part]])
    params = node["params"]
    if part == "vae":
        widths = sizes["block_out_channels"]
        if any(width % widths[0] for width in widths):
            raise ValueError
        for half in ("encoder_config", "decoder_config"):
            params[half]["params"] |= {
                "ch": widths[0],
                "ch_mult": [width // widths[0] for width in widths],
                "num_res_blocks": sizes["layers_per_block"],
                "z_channels": sizes["latent_channels"],
                "in_channels": sizes["in_channels"],
                "out_ch": sizes["out_channels"],
            }
        return node
    params |= {key: value for key, value in sizes.items() if key in params}
    params["hidden_size"] = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    params |= {"latent_height": sizes["patch_size"], "latent_width": sizes["patch_size"]}
    params["num_frames"] = 1
    modules = params["modules"]
    modules["pos_embed_config"]["params"]["text_length"] = 1
    modules["patch_embed_config"]["params"]["text_hidden_size"] = sizes["text_embed_dim"]
    return node
