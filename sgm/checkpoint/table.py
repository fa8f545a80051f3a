"""One table of names and layouts between SAT's checkpoints and diffusers': both directions use it.

A row pairs the name of a tensor in SAT with the tensors of diffusers that hold its rows. Numbers
of layers, levels and blocks are placeholders, so they come from the weights; shapes do too.
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
from sgm.errors import UserError, first_of

Part = Literal["transformer", "vae", "lora"]

# ``{i}`` and the like stand for a number, these for what is given here; ``{~l}`` is the number l
# counted from the other end.
_PLACEHOLDER = re.compile(r"\{(~?)(\w+)\}")
_PATTERNS = {"rest": ".+", "kind": "weight|bias", "side": "encoder|decoder", "ab": "[AB]"}


@dataclass(frozen=True)
class Row:
    """A pair of names with placeholders.

    Args:
        sat: name in SAT.
        diffusers: name in diffusers → which of the equal slices of SAT's tensor along its first
            axis it consists of, in its own order. Slices are counted over all names of the row.
    """

    sat: str
    diffusers: Mapping[str, Sequence[int]]

    @property
    def num_slices(self) -> int:
        """Into how many slices SAT's tensor is cut."""
        return sum(len(slices) for slices in self.diffusers.values())


def _one_to_one(pairs: Mapping[str, str]) -> tuple[Row, ...]:
    return tuple(Row(sat, {diffusers: (0,)}) for sat, diffusers in pairs.items())


_LAYER = "transformer.layers.{i}"
_BLOCK = "transformer_blocks.{i}"
_ADALN = "mixins.adaln_layer"

# The position table: both sides compute it where it is absent, so it is not carried over.
POSITION_TABLE = "mixins.pos_embed.pos_embedding"
_COMPUTED = (POSITION_TABLE, "patch_embed.pos_embedding")

TRANSFORMER = (
    Row(
        f"{_LAYER}.attention.query_key_value.{{kind}}",
        {f"{_BLOCK}.attn1.to_{name}.{{kind}}": (i,) for i, name in enumerate("qkv")},
    ),
    # Shift, scale and gate, in SAT of video's attention and MLP, then of text's attention and MLP.
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

# SAT counts the decoder's levels from the finest, diffusers from the coarsest, which comes first.
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
    """What matches a name of a template; the first row that matches counts."""
    parts, end = [], 0
    for placeholder in _PLACEHOLDER.finditer(template):
        parts.append(re.escape(template[end : placeholder.start()]))
        parts.append(f"(?P<{placeholder[2]}>{_PATTERNS.get(placeholder[2], '[0-9]{1,4}')})")
        end = placeholder.end()
    return re.compile("".join(parts) + re.escape(template[end:]))


def _translated(template: str, other: str, match: re.Match[str], num_levels: int) -> str:
    """The name of `other` for a name that matched `template`."""

    def fill(placeholder: re.Match[str]) -> str:
        value = match[placeholder[2]]
        is_reversed = placeholder[0] not in template
        return str(num_levels - 1 - int(value)) if is_reversed else value

    return _PLACEHOLDER.sub(fill, other)


def _num_levels(names: Mapping[str, Tensor]) -> int:
    """Levels of the autoencoder's decoder; 0 where there is none."""
    found = (re.match(r"decoder\.up(?:_blocks)?\.([0-9]{1,4})\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _find(name: str, part: Part, *, in_sat: bool) -> tuple[Row, str, re.Match[str]] | None:
    """The row of a name, the template in it that matched, and the match."""
    for row in _ROWS[part]:
        for template in (row.sat,) if in_sat else row.diffusers:
            if match := _pattern(template).fullmatch(name):
                return row, template, match
    return None


def _matches(
    tensors: Mapping[str, Tensor], part: Part, where: str | Path, *, in_sat: bool
) -> Iterator[tuple[str, Row, str, re.Match[str]]]:
    """Each name that is carried over, with what `_find` gives for it.

    Raises:
        UserError: at the end, if there were names that no row has.
    """
    unknown = []
    for name in tensors:
        if name in _COMPUTED:
            continue
        if found := _find(name, part, in_sat=in_sat):
            yield name, *found
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} names are not those of a CogVideoX-2B {part} in "
            f"{'SAT' if in_sat else 'diffusers'} format "
            f"({first_of(unknown)}); is it the {part} of another model?"
        )


def _slices(tensor: Tensor, count: int, name: str, where: str | Path) -> tuple[Tensor, ...]:
    """`tensor` in `count` equal pieces along its first axis."""
    if count == 1:
        return (tensor,)
    if tensor.ndim == 0 or tensor.shape[0] % count:
        raise UserError(
            f"{where}: {name} is {list(tensor.shape)}, which does not divide into {count} equal "
            "parts; the file is damaged or of another model"
        )
    return tensor.chunk(count)


def _taken(
    tensors: Mapping[str, Tensor], name: str, row: Row, slices: Sequence[int], where: str | Path
) -> Tensor:
    """Of the SAT tensor `name`, the slices that a tensor of diffusers consists of."""
    pieces = _slices(tensors[name], row.num_slices, name, where)
    return pieces[slices[0]] if len(slices) == 1 else torch.cat([pieces[i] for i in slices])


def _united(
    tensors: Mapping[str, Tensor], row: Row, names: Mapping[str, str], where: str | Path
) -> Tensor:
    """The SAT tensor of a row, from the tensors of diffusers that `names` gives per template."""
    pieces: dict[int, Tensor] = {}
    for template, slices in row.diffusers.items():
        name = names[template]
        pieces |= zip(slices, _slices(tensors[name], len(slices), name, where), strict=True)
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if first.ndim == 0 or any(piece.shape != first.shape for piece in pieces.values()):
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in names.values())
        raise UserError(
            f"{where}: the shapes of {shapes} do not go together; the file is damaged or of "
            "another model"
        )
    return torch.cat([pieces[i] for i in range(row.num_slices)])


def _made(
    make: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    sources: Mapping[str, tuple[Any, ...]],
    where: str | Path,
) -> LazyTensors:
    """Name → ``make(tensors, *source, where)``, and the same on the meta device."""

    def makers(of: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
        return {name: partial(make, of, *source, where) for name, source in sources.items()}

    return LazyTensors(makers(tensors), meta=lambda: LazyTensors(makers(on_meta(tensors))))


def to_diffusers(
    tensors: Mapping[str, Tensor], part: Part, *, where: str | Path
) -> Mapping[str, Tensor]:
    """The tensors of a SAT checkpoint under diffusers' names and in its layout.

    Args:
        tensors: names as in the plain model, without ``model.diffusion_model.``; of any dtype and
            device, meta too, which gives shapes alone. Values are carried over bit for bit.
        part: what they are.
        where: the file, for messages.

    Returns:
        Tensors that are views or put together when asked for; the position table is left out.

    Raises:
        UserError: a name is none of SAT's; or, when a tensor is asked for, a shape does not
            divide.
    """
    num_levels = _num_levels(tensors)
    sources: dict[str, tuple[str, Row, Sequence[int]]] = {}  # of a name in diffusers
    for name, row, template, match in _matches(tensors, part, where, in_sat=True):
        for other, slices in row.diffusers.items():
            translated = _translated(template, other, match, num_levels)
            sources[translated] = (name, row, slices)
    return _made(_taken, tensors, sources, where)


def to_sat(tensors: Mapping[str, Tensor], part: Part, *, where: str | Path) -> Mapping[str, Tensor]:
    """The tensors of a diffusers checkpoint under SAT's names and in its layout.

    The inverse of `to_diffusers`, with the same arguments.

    Raises:
        UserError: a name is none of diffusers', or one that SAT needs to go with another is absent;
            or, when a tensor is asked for, its parts' shapes do not go together.
    """
    num_levels = _num_levels(tensors)
    sources: dict[str, tuple[Row, dict[str, str]]] = {}  # of a name in SAT: template → name
    for name, row, template, match in _matches(tensors, part, where, in_sat=False):
        translated = _translated(template, row.sat, match, num_levels)
        sources.setdefault(translated, (row, {}))[1][template] = name
    for row, names in sources.values():
        absent = [template for template in row.diffusers if template not in names]
        if absent:
            raise UserError(
                f"{where} has {next(iter(names.values()))}, but nothing under {absent[0]} for the "
                "same layer; copy it from the original again"
            )
    return _made(_united, tensors, sources, where)
