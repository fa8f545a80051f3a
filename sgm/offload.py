"""Offloading: weights stay in host memory and are on the GPU only while they are used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import chain
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

DtypeOf = Callable[[str], torch.dtype]
P = ParamSpec("P")
R = TypeVar("R")


class OffloadedWeights:
    """Weights of a module that are on a device only inside a ``with`` block of this object.

    Parameters and buffers stay the same objects and only their data changes: compiled code stays
    valid, and tensors that two modules share stay shared. Nothing is copied back, because weights
    do not change in inference.

    All copies are made on the current stream, where the weights are also used. So no work begins
    too early, and no memory is reused before the work with it has ended.

    Args:
        module: its weights are where they stay outside the block; `move_to_host` makes copies from
            there fast.
        device: device of the weights inside the block.
        dtype_of: returns for the name of a weight its type on `device`; None keeps all types.
    """

    def __init__(
        self, module: nn.Module, device: str | torch.device, *, dtype_of: DtypeOf | None = None
    ) -> None:
        self._device = torch.device(device)
        self._is_loaded = False
        self._homes = [
            (weight, weight.data, dtype_of(name) if dtype_of else weight.dtype)
            for name, weight in chain(module.named_parameters(), module.named_buffers())
        ]

    def __enter__(self) -> None:
        """Copy the weights to the device, without waiting for the end of the copies.

        Raises:
            RuntimeError: they are on the device already; leaving this block would take them from
                the outer one.
        """
        if self._is_loaded:
            raise RuntimeError("these weights are on their device already")
        self._is_loaded = True
        try:
            for weight, home, dtype in self._homes:
                weight.data = _copied(home, self._device, dtype=dtype)
        except BaseException:  # for example, out of memory after some of the copies
            self.__exit__()
            raise

    def __exit__(self, *failure: object) -> None:
        """Drop the copies."""
        self._is_loaded = False
        for weight, home, _ in self._homes:
            weight.data = home


def _copied(home: Tensor, device: torch.device, *, dtype: torch.dtype) -> Tensor:
    """Copy a host tensor; to a GPU from page-locked memory, so that the host need not wait.

    PyTorch's allocator does not reuse the memory of a page-locked tensor before a copy from it has
    ended, even if the tensor is deleted.
    """
    if device.type != "cuda":
        return home.to(device, dtype, copy=True)
    if home.dtype != dtype or not home.is_pinned():
        home = torch.empty_like(home, dtype=dtype, pin_memory=True).copy_(home)
    return home.to(device, non_blocking=True)


@torch.no_grad()
def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy on the host, in page-locked memory if the tensor is on a GPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def move_to_host(module: nn.Module) -> None:
    """Move all weights of a module to the host, to page-locked memory if they are on a GPU."""
    for weight in chain(module.parameters(), module.buffers()):
        weight.data = host_copy(weight)


def stream_weights(
    modules: Iterable[nn.Module], device: str | torch.device, *, dtype_of: DtypeOf | None = None
) -> None:
    """Offload each module: from now on its weights are on `device` only during its own calls.

    For modules that are called one after the other. While the GPU computes one of them, the host
    prepares and copies the weights of the next one; the GPU never holds the weights of two.

    Args:
        modules: none of them is part of another.
        device: as in `OffloadedWeights`.
        dtype_of: as in `OffloadedWeights`.
    """
    for module in modules:
        weights = OffloadedWeights(module, device, dtype_of=dtype_of)
        module.forward = _within(weights, module.forward)


def _within(weights: OffloadedWeights, forward: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(forward)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with weights:
            return forward(*args, **kwargs)

    return call
