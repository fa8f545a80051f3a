"""Offloading: weights are kept in host memory and copied to the GPU only while they are used."""

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
    """Moves the weights of a module to a device for the duration of a ``with`` block.

    Only the data of parameters and buffers changes; the objects stay the same. So compiled code
    stays valid, and tensors that two modules share stay shared. Nothing is copied back, because
    weights do not change during inference.

    Copies are made on the current stream, which also runs the work that uses the weights. So this
    work never starts before a copy has ended, and memory is not reused while it is still in use.

    Args:
        module: the module. Outside the block its weights stay where they are now; after
            `move_to_host` they can be copied fast.
        device: the device of the weights inside the block.
        dtype_of: returns the type on `device` for the name of a weight; None keeps all types.
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
        """Copy the weights to the device, without waiting until the copies have ended.

        Raises:
            RuntimeError: a block of this object is active already. At the end of the inner block
                the outer block would lose the weights.
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
        """Drop the copies on the device."""
        self._is_loaded = False
        for weight, home, _ in self._homes:
            weight.data = home


def _copied(home: Tensor, device: torch.device, *, dtype: torch.dtype) -> Tensor:
    """Copy a host tensor to `device`, for a GPU from page-locked memory without waiting.

    The page-locked tensor may be deleted before the copy has ended, because PyTorch's allocator
    does not reuse its memory until then.
    """
    if device.type != "cuda":
        return home.to(device, dtype, copy=True)
    if home.dtype != dtype or not home.is_pinned():
        home = torch.empty_like(home, dtype=dtype, pin_memory=True).copy_(home)
    return home.to(device, non_blocking=True)


@torch.no_grad()
def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy of `tensor` on the host, in page-locked memory if `tensor` is on a GPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def move_to_host(module: nn.Module) -> None:
    """Move all weights of a module to the host; those on a GPU go to page-locked memory."""
    for weight in chain(module.parameters(), module.buffers()):
        weight.data = host_copy(weight)


def stream_weights(
    modules: Iterable[nn.Module], device: str | torch.device, *, dtype_of: DtypeOf | None = None
) -> None:
    """Offload each module: from now on its weights are on `device` only while it is called.

    Use this for modules that are called one after another. While the GPU computes one module, the
    host prepares and copies the weights of the next module. The GPU never holds the weights of two
    modules.

    Args:
        modules: the modules; none may be part of another.
        device: the device for the calls; see `OffloadedWeights`.
        dtype_of: returns the type on `device` for the name of a weight; see `OffloadedWeights`.
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
