"""SAT's Linears and the LoRA layers in their place, in a form that is fast when compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project(linear: nn.Module, x: Tensor, *, num_parts: int) -> list[Tensor]:
    """What ``linear(x)`` holds in `num_parts` equal parts along its last axis, x (b, n, d).

    Computed part by part: to divide the whole, and to join the gradients of its parts again,
    would copy them. A LoRA layer adds ``scaling * B A x`` to each part, scaled where there are few
    channels, and with one product for the A of all parts.
    """
    base = getattr(linear, "original", linear)
    # ZeRO-3 brings the weights together for a module's call only; autocast knows PyTorch's
    # operators, and not the one below.
    if hasattr(base.weight, "ds_id") or torch.is_autocast_enabled(x.device.type):
        return list(linear(x).chunk(num_parts, dim=-1))
    bases = list(zip(base.weight.chunk(num_parts), base.bias.chunk(num_parts), strict=True))
    if base is linear:
        return [F.linear(x, weight, bias) for weight, bias in bases]
    down = F.linear(linear.lora_dropout(x), torch.cat(tuple(linear.matrix_A))) * linear.scaling
    lows = down.chunk(num_parts, dim=-1)
    return [
        sum_of_linears(x, weight, bias, low, up)
        for (weight, bias), low, up in zip(bases, lows, linear.matrix_B, strict=True)
    ]


@torch.library.custom_op("cogvideox::sum_of_linears", mutates_args=())
def sum_of_linears(x: Tensor, weight: Tensor, bias: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """``x weight^T + bias + low up^T``, x (…, d), weight (e, d), low (…, r), up (e, r) → (…, e).

    The large product adds to the small one's result while it is written, which saves to read both
    again. An operator of its own, since PyTorch's would copy that result first.
    """
    # Of rows, since with more axes PyTorch adds the bias in a pass of its own.
    total = torch.addmm(bias, low.flatten(0, -2), up.t())
    total.addmm_(x.flatten(0, -2), weight.t())
    return total.unflatten(0, x.shape[:-1])


@sum_of_linears.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, low: Tensor, up: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save_for_backward(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, _, low, up = inputs
    ctx.save_for_backward(x, weight, low, up)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, low, up = ctx.saved_tensors
    rows = gradient.flatten(0, -2)
    of_x, of_weight, of_bias, of_low, of_up = ctx.needs_input_grad
    return (
        gradient @ weight if of_x else None,
        rows.t() @ x.flatten(0, -2) if of_weight else None,
        rows.sum(dim=0) if of_bias else None,
        gradient @ up if of_low else None,
        rows.t() @ low.flatten(0, -2) if of_up else None,
    )


sum_of_linears.register_autograd(_backward, setup_context=_save_for_backward)
