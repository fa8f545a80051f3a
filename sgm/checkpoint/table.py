"""Converts tensor names and layouts between SAT's and diffusers' checkpoints, in both directions.

Both directions use one table. A row maps the name of a tensor in SAT to the tensors in diffusers
that contain its slices. The indices of layers, levels and blocks are placeholders; their numbers
and all shapes are taken from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sgm.checkpoint.tensors import LazyTensors, on_meta
from sgm.checkpoint.weight_file import damaged
from sgm.errors import UserError, first_of

Part = Literal["transformer", "vae", "lora"]

# A placeholder such as ``{i}`` matches a number; placeholders in `_PATTERNS` match other texts.
# ``{~l}`` is the number l, counted from the other end.
_PLACEHOLDER = re.compile(r"\{(~?)(\w+)\}")
_PATTERNS = {"rest": ".+", "kind": "weight|bias", "side": "encoder|decoder", "ab": "[AB]"}


@dataclass(frozen=True)
class Row:
    """A row of the table: the name of a SAT tensor and the diffusers tensors with its slices.

    The SAT tensor is cut along its first axis into equal slices. The number of slices is the total
    over all names in `diffusers`.

    Args:
        sat: the name in SAT, with placeholders.
        diffusers: name in diffusers, with placeholders → indices of the slices that are
            concatenated, in this order, to the diffusers tensor.
    """

    sat: str
    diffusers: Mapping[str, Sequence[int]]


def _one_to_one(pairs: Mapping[str, str]) -> tuple[Row, ...]:
    return tuple(Row(sat, {diffusers: (0,)}) for sat, diffusers in pairs.items())


_LAYER = "transformer.layers.{i}"
_BLOCK = "transformer_blocks.{i}"
_ADALN = "mixins.adaln_layer"

# The position table is not converted, because SAT and diffusers compute it if it is missing.
POSITION_TABLE = "mixins.pos_embed.pos_embedding"
_COMPUTED = (POSITION_TABLE, "patch_embed.pos_embedding")

TRANSFORMER = (
    Row(
        f"{_LAYER}.attention.query_key_value.{{kind}}",
        {f"{_BLOCK}.attn1.to_{name}.{{kind}}": (i,) for i, name in enumerate("qkv")},
    ),
    # SAT's slices are (shift, scale, gate) of: 0 the video's attention, 1 the video's MLP, 2 the
    # text's attention, 3 the text's MLP.
    Row(
        f"{_ADALN}.adaLN_modulations.{{i}}.1.{{kind}}",
        {f"{_BLOCK}.norm1.linear.{{kind}}": (0, 2), f"{_BLOCK}.norm2.linear.{{kind}}": (1, 3)},
    ),
    *_one_to_one(
        {
            f"{sat}.{{kind}}": f"{diffusers}.{{kind}}"
            for sat, diffusers in {
                "time_embed.0": "time_embedding.linear_1",
                "time_embed.2": "time_embedding.linear_2",
                "mixins.patch_embed.proj": "patch_embed.proj",
                "mixins.patch_embed.text_proj": "patch_embed.text_proj",
                f"{_LAYER}.input_layernorm": f"{_BLOCK}.norm1.norm",
                f"{_LAYER}.post_attention_layernorm": f"{_BLOCK}.norm2.norm",
                f"{_LAYER}.attention.dense": f"{_BLOCK}.attn1.to_out.0",
                f"{_LAYER}.mlp.dense_h_to_4h": f"{_BLOCK}.ff.net.0.proj",
                f"{_LAYER}.mlp.dense_4h_to_h": f"{_BLOCK}.ff.net.2",
                f"{_ADALN}.query_layernorm_list.{{i}}": f"{_BLOCK}.attn1.norm_q",
                f"{_ADALN}.key_layernorm_list.{{i}}": f"{_BLOCK}.attn1.norm_k",
                "transformer.final_layernorm": "norm_final",
                "mixins.final_layer.norm_final": "norm_out.norm",
                "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
                "mixins.final_layer.linear": "proj_out",
            }.items()
        }
    ),
)

LORA = _one_to_one(
    {
        f"{_LAYER}.attention.{sat}": f"{_BLOCK}.attn1.{diffusers}.lora_{{ab}}.weight"
        for sat, diffusers in {
            "query_key_value.matrix_{ab}.0": "to_q",
            "query_key_value.matrix_{ab}.1": "to_k",
            "query_key_value.matrix_{ab}.2": "to_v",
            "dense.matrix_{ab}.0": "to_out.0",
        }.items()
    }
)

# SAT numbers the decoder's levels from the finest, diffusers from the coarsest, which runs first.
_LEVELS = {
    "encoder.down.{l}.downsample": "encoder.down_blocks.{l}.downsamplers.0",
    "decoder.up.{l}.upsample": "decoder.up_blocks.{~l}.upsamplers.0",
}
_RESNETS = {
    "encoder.down.{l}.block.{j}": "encoder.down_blocks.{l}.resnets.{j}",
    "decoder.up.{l}.block.{j}": "decoder.up_blocks.{~l}.resnets.{j}",
    "{side}.mid.block_1": "{side}.mid_block.resnets.0",
    "{side}.mid.block_2": "{side}.mid_block.resnets.1",
}
_SAME = ("conv_in", "conv_out", "norm_out")

VAE = _one_to_one(
    {f"{sat}.nin_shortcut.{{rest}}": f"{d}.conv_shortcut.{{rest}}" for sat, d in _RESNETS.items()}
    | {f"{sat}.{{rest}}": f"{d}.{{rest}}" for sat, d in (_RESNETS | _LEVELS).items()}
    | {f"{{side}}.{name}.{{rest}}": f"{{side}}.{name}.{{rest}}" for name in _SAME}
)

_ROWS: Mapping[Part, tuple[Row, ...]] = {"transformer": TRANSFORMER, "vae": VAE, "lora": LORA}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """Return the regular expression for names that match `template`."""
    parts, end = [], 0
    for placeholder in _PLACEHOLDER.finditer(template):
        parts.append(re.escape(template[end : placeholder.start()]))
        parts.append(f"(?P<{placeholder[2]}>{_PATTERNS.get(placeholder[2], '[0-9]{1,4}')})")
        end = placeholder.end()
    return re.compile("".join(parts) + re.escape(template[end:]))


def _translated(template: str, other: str, match: re.Match[str], num_levels: int) -> str:
    """Fill the placeholders of the template `other` with what `match` captured for `template`.

    `num_levels` is needed for levels that the two templates count from opposite ends.
    """

    def fill(placeholder: re.Match[str]) -> str:
        value = match[placeholder[2]]
        is_reversed = placeholder[0] not in template
        return str(num_levels - 1 - int(value)) if is_reversed else value

    return _PLACEHOLDER.sub(fill, other)


def _num_levels(names: Mapping[str, Tensor]) -> int:
    """Return the number of levels in the autoencoder's decoder; 0 if there is no decoder."""
    found = (re.match(r"decoder\.up(?:_blocks)?\.([0-9]{1,4})\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _matches(
    tensors: Mapping[str, Tensor], part: Part, where: str | Path, *, in_sat: bool
) -> Iterator[tuple[str, Row, str, re.Match[str]]]:
    """Yield (name, row, template, match) for each tensor to convert.

    `row` is the first row with a `template` that matches the name. `match` is that match.

    Raises:
        UserError: at the end, if some names match no row.
    """
    templates = [(r, t) for r in _ROWS[part] for t in ((r.sat,) if in_sat else r.diffusers)]
    unknown = []
    for name in (name for name in tensors if name not in _COMPUTED):
        for row, template in templates:
            if match := _pattern(template).fullmatch(name):
                yield name, row, template, match
                break
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} tensor names do not belong to a CogVideoX-2B {part} in "
            f"{'SAT' if in_sat else 'diffusers'} format "
            f"({first_of(unknown)}); is it the {part} of another model?"
        )


def _slices(tensor: Tensor, count: int, name: str, where: str | Path) -> tuple[Tensor, ...]:
    """Split `tensor` into `count` equal pieces along its first axis.

    Raises:
        UserError: the axis is not divisible by `count`.
    """
    if count == 1:
        return (tensor,)
    if tensor.ndim == 0 or tensor.shape[0] % count:
        what = f"has {name} of {list(tensor.shape)}, which cannot be split into {count} equal parts"
        raise damaged(where, what)
    return tensor.chunk(count)


def _taken(
    tensors: Mapping[str, Tensor], name: str, row: Row, slices: Sequence[int], where: str | Path
) -> Tensor:
    """Return the diffusers tensor that consists of `slices` of the SAT tensor `name`."""
    pieces = _slices(tensors[name], sum(map(len, row.diffusers.values())), name, where)
    return pieces[slices[0]] if len(slices) == 1 else torch.cat([pieces[i] for i in slices])


def _united(
    tensors: Mapping[str, Tensor], row: Row, names: Mapping[str, str], where: str | Path
) -> Tensor:
    """Return the SAT tensor of a row, made from diffusers tensors.

    Args:
        tensors: name in diffusers → tensor.
        row: the row of the table.
        names: template in `row.diffusers` → name of the tensor that matches the template.
        where: the file, for messages.
    """
    pieces: dict[int, Tensor] = {}
    for template, slices in row.diffusers.items():
        name = names[template]
        pieces |= zip(slices, _slices(tensors[name], len(slices), name, where), strict=True)
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if first.ndim == 0 or any(piece.shape != first.shape for piece in pieces.values()):
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in names.values())
        raise damaged(where, f"has {shapes}, whose shapes do not match")
    return torch.cat([pieces[i] for i in range(len(pieces))])


def _made(
    make: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    sources: Mapping[str, tuple[Any, ...]],
    where: str | Path,
) -> LazyTensors:
    """Return a lazy mapping name → ``make(tensors, *source, where)``, for each of `sources`."""
    shapes = on_meta(tensors)
    return LazyTensors(
        {name: partial(make, tensors, *source, where) for name, source in sources.items()},
        meta={name: make(shapes, *source, where) for name, source in sources.items()},
    )


def to_diffusers(
    tensors: Mapping[str, Tensor], part: Part, *, where: str | Path
) -> Mapping[str, Tensor]:
    """Convert the tensors of a SAT checkpoint to diffusers' names and layout.

    Args:
        tensors: name → tensor. Names have no prefix ``model.diffusion_model.``. Any dtype and
            device is possible; meta tensors give meta tensors.
        part: the part of the model that the tensors belong to.
        where: the file, for messages.

    Returns:
        The converted tensors, which are views or made on access; all values keep every bit. The
        position table is left out.

    Raises:
        UserError: a name is unknown in SAT, or a tensor cannot be split into equal slices.
    """
    num_levels = _num_levels(tensors)
    sources: dict[str, tuple[str, Row, Sequence[int]]] = {}  # keys: names in diffusers
    for name, row, template, match in _matches(tensors, part, where, in_sat=True):
        for other, slices in row.diffusers.items():
            translated = _translated(template, other, match, num_levels)
            sources[translated] = (name, row, slices)
    return _made(_taken, tensors, sources, where)


def to_sat(tensors: Mapping[str, Tensor], part: Part, *, where: str | Path) -> Mapping[str, Tensor]:
    """Convert the tensors of a diffusers checkpoint to SAT's names and layout.

    This is the inverse of `to_diffusers` and has the same arguments.

    Raises:
        UserError: a name is unknown in diffusers, another tensor that is part of the same SAT
            tensor is missing, or the shapes of the parts do not match.
    """
    num_levels = _num_levels(tensors)
    sources: dict[str, tuple[Row, dict[str, str]]] = {}  # name in SAT → (row, template → name)
    for name, row, template, match in _matches(tensors, part, where, in_sat=False):
        translated = _translated(template, row.sat, match, num_levels)
        sources.setdefault(translated, (row, {}))[1][template] = name
    for row, names in sources.values():
        missing = [template for template in row.diffusers if template not in names]
        if missing:
            present = next(iter(names.values()))
            raise damaged(where, f"has {present}, but no {missing[0]} for the same layer")
    return _made(_united, tensors, sources, where)
