"""The sizes that weights show, a model of these sizes without values, and whether both agree."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sgm.checkpoint.strict_loading import check_fit, differences
from sgm.checkpoint.table import POSITION_TABLE, Part, to_diffusers
from sgm.checkpoint.tensors import on_meta
from sgm.config import Config
from sgm.errors import UserError
from sgm.util import build_on_meta
from tools.launch.choose_config import BUNDLED, FULL
from tools.weights.sources import ROOT, read_config

SHIPPED = (FULL, BUNDLED)  # configurations, by their paths in the repository
_NODES = {"transformer": "network_config", "vae": "first_stage_config"}
_MOST_LAYERS = 200  # more than any model of this kind; the names in a damaged file may give more


def sizes_of(tensors: Mapping[str, Tensor], part: Part, where: str | Path) -> dict[str, Any]:
    """The sizes of a part's weights, by the keys of diffusers' config.json.

    Args:
        tensors: names as in SAT.
        part: transformer or vae.
        where: the file, for messages.

    Raises:
        UserError: names or shapes are not those of the part.
    """
    metas = to_diffusers(on_meta(tensors), part, where=where)

    def shape(name: str, ndim: int) -> list[int]:
        tensor = metas.get(f"{name}.weight")
        if tensor is None or tensor.ndim != ndim:
            raise UserError(
                f"{where} is damaged or of another model: {name}.weight is missing or does not "
                f"have {ndim} dimensions"
            )
        return list(tensor.shape)

    def count(pattern: str) -> int:
        found = (re.match(pattern, name) for name in metas)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    if part == "vae":
        levels = range(count(r"encoder\.down_blocks\.(\d+)\."))
        first = "encoder.down_blocks.{}.resnets.0.conv1.conv"
        return {
            "block_out_channels": [shape(first.format(level), 5)[0] for level in levels],
            "layers_per_block": count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            "latent_channels": shape("decoder.conv_in.conv", 5)[1],
            "in_channels": shape("encoder.conv_in.conv", 5)[1],
            "out_channels": shape("decoder.conv_out.conv", 5)[0],
        }
    width, channels, patch, _ = shape("patch_embed.proj", 4)
    (head,) = shape("transformer_blocks.0.attn1.norm_q", 1)
    return {
        "num_layers": count(r"transformer_blocks\.(\d+)\."),
        "num_attention_heads": width // max(head, 1),
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": shape("proj_out", 2)[0] // max(patch, 1) ** 2,
        "patch_size": patch,
        "text_embed_dim": shape("patch_embed.text_proj", 2)[1],
        "time_embed_dim": shape("time_embedding.linear_1", 2)[0],
    }


@cache
def shipped_config(name: str) -> Config:
    """A configuration of `SHIPPED`."""
    return read_config(ROOT / name)


@cache
def shipped_shapes(name: str, part: Part) -> Mapping[str, Tensor]:
    """Name → meta tensor of the transformer or autoencoder of a configuration of `SHIPPED`."""
    return build_on_meta(shipped_config(name).model[_NODES[part]]).state_dict()


def model_of(sizes: Mapping[str, Any], part: Part, *, where: str | Path) -> nn.Module:
    """A transformer for the shortest clips, or an autoencoder, on the meta device.

    Args:
        sizes: as `sizes_of` returns them.
        part: transformer or vae.
        where: the file that has these sizes, for messages.

    Raises:
        UserError: no model can have them.
    """
    counts = [n for size in sizes.values() for n in (size if isinstance(size, list) else [size])]
    layers = sizes["num_layers" if part == "transformer" else "layers_per_block"]
    try:
        if min(counts) < 1 or layers > _MOST_LAYERS:
            raise ValueError
        return build_on_meta(_node_of(sizes, part))
    except (UserError, ValueError, ArithmeticError, LookupError, RuntimeError, AssertionError):
        given = ", ".join(f"{key}={value}" for key, value in sizes.items())
        raise UserError(
            f"{where} is damaged or of another model: no CogVideoX-2B has {given}"
        ) from None


def _node_of(sizes: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """The 2B model's node of a part with other sizes."""
    node = copy.deepcopy(shipped_config(FULL).model[_NODES[part]])
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


def check_part(
    tensors: Mapping[str, Tensor],
    part: Part,
    *,
    where: str | Path,
    described_by: str,
    expected: Mapping[str, Any],
    model: nn.Module | None = None,
    hint: str,
) -> dict[str, Any]:
    """Check that the weights of a part are whole and have the sizes that are expected.

    Args:
        tensors: names as in SAT. The position table may be missing, since it is computed.
        part: transformer or vae.
        where: the file, for messages.
        described_by: the file that the expected sizes come from, for messages.
        expected: sizes as `sizes_of` returns them, or some of them.
        model: has the names and shapes that are expected; None for one of the weights' own sizes.
        hint: end of messages: what to do.

    Returns:
        The sizes of the weights.

    Raises:
        UserError: sizes differ, or names or shapes are missing or unknown.
    """
    sizes = sizes_of(tensors, part, where)
    for key, value in sizes.items():
        if expected.get(key, value) != value:
            raise UserError(
                f"{where} has {key}={value}, but {described_by} says {key}={expected[key]!r}; "
                f"{hint}"
            )
    wanted = (model or model_of(sizes, part, where=where)).state_dict()
    name = f"the model of {described_by}" if model else "a model of its sizes"
    check_fit(on_meta(tensors), _needed(wanted, tensors), path=where, model=name, hint=hint)
    return sizes


@dataclass(frozen=True)
class Comparison:
    """How weights differ from a model.

    Args:
        config: the configuration of `SHIPPED` whose model is nearest to the weights.
        fits: whether this configuration loads the weights as they are.
        differences: from a model with the sizes of the weights, or from the nearest model if no
            model can have these sizes; as `sgm.checkpoint.strict_loading.differences`.
        sizes: of the weights, as `sizes_of` returns them; empty if weights that show them are
            missing.
    """

    config: str
    fits: bool
    differences: Mapping[str, list[str]]
    sizes: Mapping[str, Any]

    @property
    def is_whole(self) -> bool:
        """Whether the weights are exactly those of a model of some sizes."""
        return not any(self.differences.values())


def compare(shapes: Mapping[str, Tensor], part: Part) -> Comparison:
    """Compare weights with the models of the shipped configurations and with their own sizes.

    Args:
        shapes: name in SAT → tensor on the meta device.
        part: transformer or vae.
    """
    found = {
        name: differences(shapes, _needed(shipped_shapes(name, part), shapes)) for name in SHIPPED
    }
    nearest = min(SHIPPED, key=lambda name: sum(map(len, found[name].values())))
    fits, rest = not any(found[nearest].values()), found[nearest]
    sizes: Mapping[str, Any] = {}
    with suppress(UserError):  # no model has these sizes, or weights that show them are missing
        sizes = sizes_of(shapes, part, "")
        if not fits:
            own = model_of(sizes, part, where="").state_dict()
            # The size of the position table depends on the clips, not on the model.
            rest = differences(_without_positions(shapes), _without_positions(own))
    return Comparison(nearest, fits, rest, sizes)


def _without_positions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != POSITION_TABLE}


def _needed(model: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a model needs of a file: the position table is compared only if the file has it."""
    return model if POSITION_TABLE in found else _without_positions(model)
