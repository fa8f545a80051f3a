"""A Linear and the GELU after it, as one product where the GPU's library offers that."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


def activated(linear: nn.Module, x: Tensor, *, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """``activation(linear(x))`` of a GELU (tanh approximation), x (b, n, d) → (b, n, 4d).

    On a GPU the GELU is computed on the product's float32 sums before they are rounded, which
    saves a pass over the largest tensor of a block. Where the weights are trained, the backward
    pass needs the product itself, so there it would cost more than it saves.
    """
    weight = linear.weight
    is_constant = not (torch.is_grad_enabled() and weight.requires_grad)
    # ZeRO-3 brings the weights together for a module's call only.
    is_whole = isinstance(linear.bias, Tensor) and not hasattr(weight, "ds_id")
    if is_constant and is_whole and weight.is_cuda and weight.dtype in _HALF:
        return linear_gelu(x, weight, linear.bias)
    return activation(linear(x))


@torch.library.custom_op("cogvideox::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh approximation) of ``x weight^T + bias``, x (…, d), weight (e, d) → (…, e).

    Has a gradient of x only. An operator of its own, since PyTorch's has none.
    """
    if not x.is_cuda:  # PyTorch's operator takes the exact GELU there
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    product = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return product.unflatten(0, x.shape[:-1])


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save_for_backward(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
    x, weight, bias = ctx.saved_tensors
    product = F.linear(x, weight, bias)
    of_product = torch.ops.aten.gelu_backward(gradient, product, approximate="tanh")
    return of_product @ weight, None, None


linear_gelu.register_autograd(_backward, setup_context=_save_for_backward)
