"""Weights that wait in the host's memory and are on the GPU only while they are used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

DtypeOf = Callable[[str], torch.dtype]


class OffloadedWeights:
    """The weights of a module that are on a device between `arrive` and `leave` only.

    As a context manager it does both. Parameters and buffers stay the same objects and only their
    data changes: compiled code stays valid, and what two modules share stays shared. Nothing is
    copied back, since weights do not change in inference.

    All copies are made on the current stream, as the work with the weights is: so none of it
    begins too early, and no memory is used again before the work in it has ended.

    Args:
        module: its weights are where they are to wait; `move_to_host` is the fastest place.
        device: which they visit.
        dtype_of: from the name of a weight to its type on `device`; None: as it is.
    """

    def __init__(
        self,
        module: nn.Module,
        device: str | torch.device,
        *,
        dtype_of: DtypeOf | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._is_visiting = False
        self._homes = [
            (weight, weight.data, dtype_of(name) if dtype_of else weight.dtype)
            for name, weight in chain(module.named_parameters(), module.named_buffers())
        ]

    def arrive(self) -> None:
        """Copy the weights to the device, without waiting for the copies' end.

        Raises:
            RuntimeError: they are there already, for somebody who would be left without them.
        """
        if self._is_visiting:
            raise RuntimeError("these weights are on their device already")
        self._is_visiting = True
        for weight, home, dtype in self._homes:
            weight.data = _copied(home, self._device, dtype=dtype)

    def leave(self) -> None:
        """Drop the copies."""
        self._is_visiting = False
        for weight, home, _ in self._homes:
            weight.data = home

    def __enter__(self) -> None:
        try:
            self.arrive()
        except BaseException:  # out of memory half way, for one
            self.leave()
            raise

    def __exit__(self, *failure: object) -> None:
        self.leave()


def _copied(home: Tensor, device: torch.device, *, dtype: torch.dtype) -> Tensor:
    """A copy of a host tensor; to a GPU by way of page-locked memory, which it reads by itself.

    What becomes of a page-locked tensor that nobody holds any more is PyTorch's allocator's
    concern: its memory is not given out again before the copy has ended.
    """
    if device.type != "cuda":
        return home.to(device, dtype, copy=True)
    if home.dtype != dtype or not home.is_pinned():
        home = torch.empty_like(home, dtype=dtype, pin_memory=True).copy_(home)
    return home.to(device, non_blocking=True)


@torch.no_grad()
def host_copy(tensor: Tensor) -> Tensor:
    """A copy on the host, in page-locked memory if the tensor is on a GPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def move_to_host(module: nn.Module) -> None:
    """Move all weights of a module to the host, where they then are in page-locked memory."""
    for weight in chain(module.parameters(), module.buffers()):
        weight.data = host_copy(weight)


def stream_weights(
    modules: Iterable[nn.Module], device: str | torch.device, *, dtype_of: DtypeOf | None = None
) -> None:
    """Let the weights of each module, with all inside it, visit `device` for its own calls only.

    For modules that are called one after the other: the host then prepares and copies the weights
    of one while the GPU still computes the one before, and two of them are never on it.

    Args:
        modules: none of them within another.
        device, dtype_of: as of `OffloadedWeights`.
    """
    for module in modules:
        weights = OffloadedWeights(module, device, dtype_of=dtype_of)
        module.forward = _visited(module.forward, weights)


def _visited(forward: Callable[..., Any], weights: OffloadedWeights) -> Callable[..., Any]:
    """`forward` with `weights` on their device."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with weights:
            return forward(*args, **kwargs)

    return call
