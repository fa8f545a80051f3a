"""Mappings that make tensors on access, and conversion of tensors to another precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sgm.errors import UserError


class LazyTensors(Mapping[str, Tensor]):
    """A mapping name → tensor. It makes each tensor on access, so few are in memory at once.

    Args:
        makers: name → function that makes the tensor.
        meta: name → the same tensor on the meta device.
    """

    def __init__(
        self, makers: Mapping[str, Callable[[], Tensor]], *, meta: Mapping[str, Tensor]
    ) -> None:
        self._makers = makers
        self.meta = meta

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers  # Mapping.__contains__ would make the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def on_meta(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors on the meta device: their shapes and dtypes, without reading values."""
    if isinstance(tensors, LazyTensors):
        return tensors.meta
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def chosen(tensors: Mapping[str, Tensor], names: Iterable[str]) -> LazyTensors:
    """Return only the tensors called `names`; lazy tensors are still made on access."""
    makers = {name: partial(tensors.__getitem__, name) for name in names}
    meta = on_meta(tensors)
    return LazyTensors(makers, meta={name: meta[name] for name in makers})


def rounded(tensor: Tensor, dtype: torch.dtype, *, name: str, where: str | Path) -> Tensor:
    """Return `tensor` converted to `dtype`; an integer tensor is returned unchanged.

    Raises:
        UserError: the tensor has values beyond the range of `dtype`.
    """
    if not tensor.is_floating_point() or tensor.dtype is dtype:
        return tensor
    result = tensor.to(dtype)
    if not result.isfinite().all() and tensor.isfinite().all():
        raise UserError(
            f"{where}: {name} has values beyond the range of {str(dtype)[6:]}; use bfloat16 "
            "or keep the original precision"
        )
    return result


def in_dtype(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, *, where: str | Path
) -> Mapping[str, Tensor]:
    """Return the tensors in `dtype`, converted on access; None keeps the dtype of each tensor.

    Raises:
        UserError: on access to a tensor that has values beyond the range of `dtype`.
    """
    if dtype is None:
        return tensors

    def make(name: str) -> Tensor:
        return rounded(tensors[name], dtype, name=name, where=where)

    meta = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in on_meta(tensors).items()
    }
    return LazyTensors({name: partial(make, name) for name in tensors}, meta=meta)
