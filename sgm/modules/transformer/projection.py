"""SAT's Linears and the LoRA layers in their place, in a form that is fast when compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project(linear: nn.Module, x: Tensor, *, num_parts: int) -> list[Tensor]:
    """What ``linear(x)`` holds in `num_parts` equal parts along its last axis, x (b, n, d).

    Computed part by part: to divide the whole, and to join the gradients of its parts again,
    would copy them.

    Args:
        linear: SAT's Linear, with a bias, or a LoRA layer on one.
    """
    base = getattr(linear, "original", linear)
    is_lora = base is not linear
    # ZeRO-3 brings the weights together for a module's call only. Autocast casts for PyTorch's
    # operators, not for the one of LoRA.
    is_divided = hasattr(base.weight, "ds_id")
    if is_divided or (is_lora and torch.is_autocast_enabled(x.device.type)):
        return list(linear(x).chunk(num_parts, dim=-1))
    if not is_lora:
        weights, biases = base.weight.chunk(num_parts), base.bias.chunk(num_parts)
        return [F.linear(x, *part) for part in zip(weights, biases, strict=True)]
    down = torch.cat(tuple(linear.matrix_A)) * linear.scaling
    dropped = linear.lora_dropout(x) if linear.training else x
    *parts, _ = lora_linear(
        x, None if dropped is x else dropped, base.weight, base.bias, down, list(linear.matrix_B)
    )
    return parts


@torch.library.custom_op("cogvideox::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor,
    dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    down: Tensor,
    ups: list[Tensor],
) -> list[Tensor]:
    """A Linear with LoRA (Hu et al., "LoRA", section 4.1): ``W x + bias + B A x``, in parts.

    An operator of its own, because PyTorch's would write each product and read all again for their
    sum: here each product adds to the one before while it is written. Its gradient has none.

    Args:
        x: (…, d).
        dropped: what A is given in place of `x`, if that is something else.
        weight, bias: (parts * e, d) and (parts * e,).
        down: the A of all parts, with their scale, (parts * r, d).
        ups: the B of each part, (e, r).

    Returns:
        Each part (…, e); then, without a gradient, ``A x`` for the backward pass,
        (rows of x, parts * r).
    """
    rows = x.flatten(0, -2)
    low = (rows if dropped is None else dropped.flatten(0, -2)) @ down.t()
    count = len(ups)
    parts = []
    for up, of_part, part_weight, part_bias in zip(
        ups, low.chunk(count, dim=-1), weight.chunk(count), bias.chunk(count), strict=True
    ):
        part = torch.addmm(part_bias, of_part, up.t()).addmm_(rows, part_weight.t())
        parts.append(part.unflatten(0, x.shape[:-1]))
    return [*parts, low]


@lora_linear.register_fake
def _(x, dropped, weight, bias, down, ups) -> list[Tensor]:
    parts = [x.new_empty((*x.shape[:-1], up.shape[0])) for up in ups]
    return [*parts, x.new_empty((x.shape[:-1].numel(), down.shape[0]))]


def _save_for_backward(ctx, inputs: tuple, output: list[Tensor]) -> None:
    x, dropped, weight, _, down, ups = inputs
    ctx.save_for_backward(x, dropped, weight, down, output[-1], *ups)


def _backward(ctx, gradients: list[Tensor]) -> tuple[Tensor | list[Tensor | None] | None, ...]:
    x, dropped, weight, down, low, *ups = ctx.saved_tensors
    of_x, of_dropped, of_weight, of_bias, of_down, of_ups = ctx.needs_input_grad
    *of_parts, _ = (gradient.flatten(0, -2) for gradient in gradients)
    count, rows = len(ups), x.flatten(0, -2)
    of_low = torch.cat([of_part @ up for of_part, up in zip(of_parts, ups, strict=True)], dim=-1)
    lefts, rights = of_parts, list(weight.chunk(count))
    if dropped is None:
        lefts, rights = [*lefts, of_low], [*rights, down]
    low_rows = rows if dropped is None else dropped.flatten(0, -2)
    return (
        sum_of_products(lefts, rights).unflatten(0, x.shape[:-1]) if of_x else None,
        (of_low @ down).unflatten(0, x.shape[:-1]) if of_dropped else None,
        torch.cat([of_part.t() @ rows for of_part in of_parts]) if of_weight else None,
        torch.cat([of_part.sum(dim=0) for of_part in of_parts]) if of_bias else None,
        of_low.t() @ low_rows if of_down else None,
        [
            of_part.t() @ part_low if needed else None
            for of_part, part_low, needed in zip(
                of_parts, low.chunk(count, dim=-1), of_ups, strict=True
            )
        ],
    )


lora_linear.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("cogvideox::sum_of_products", mutates_args=())
def sum_of_products(lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    """``lefts[0] rights[0] + lefts[1] rights[1] + …`` of matrices; an operator as the one above."""
    total = lefts[0] @ rights[0]
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        total.addmm_(left, right)
    return total


@sum_of_products.register_fake
def _(lefts: list[Tensor], rights: list[Tensor]) -> Tensor:
    return lefts[0].new_empty((lefts[0].shape[0], rights[0].shape[1]))
