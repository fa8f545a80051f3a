"""Lazy mappings of tensors, and tensors in another precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sgm.errors import UserError


class LazyTensors(Mapping[str, Tensor]):
    """Name → tensor, each made on access, so that few are in memory at once.

    Args:
        makers: name → function that makes the tensor.
        meta: the same names with tensors on the meta device.
    """

    def __init__(
        self, makers: Mapping[str, Callable[[], Tensor]], *, meta: Mapping[str, Tensor]
    ) -> None:
        self._makers = makers
        self.meta = meta

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers  # Mapping's own would make the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def on_meta(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same names with tensors on the meta device: shapes and dtypes, without reading values."""
    if isinstance(tensors, LazyTensors):
        return tensors.meta
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def chosen(tensors: Mapping[str, Tensor], names: Iterable[str]) -> LazyTensors:
    """The tensors of these names, each still made on access if it is lazy."""
    makers = {name: partial(tensors.__getitem__, name) for name in names}
    meta = on_meta(tensors)
    return LazyTensors(makers, meta={name: meta[name] for name in makers})


def rounded(tensor: Tensor, dtype: torch.dtype, *, name: str, where: str | Path) -> Tensor:
    """A tensor in another precision; a tensor of whole numbers stays as it is.

    Raises:
        UserError: it has values beyond the range of `dtype`.
    """
    if not tensor.is_floating_point() or tensor.dtype is dtype:
        return tensor
    result = tensor.to(dtype)
    if not result.isfinite().all() and tensor.isfinite().all():
        raise UserError(
            f"{where}: {name} holds values beyond the range of {str(dtype)[6:]}; take bfloat16 "
            "or leave the precision as it is"
        )
    return result


def in_dtype(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, *, where: str | Path
) -> Mapping[str, Tensor]:
    """The tensors in another precision, rounded on access; None keeps the type of each tensor.

    Raises:
        UserError: on access to a tensor with values beyond the range of `dtype`.
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
