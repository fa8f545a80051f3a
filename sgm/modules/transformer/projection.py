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
    if hasattr(base.weight, "ds_id"):  # ZeRO-3 brings the weights together for a module's call only
        return list(linear(x).chunk(num_parts, dim=-1))
    parts = [
        F.linear(x, weight, bias)
        for weight, bias in zip(
            base.weight.chunk(num_parts), base.bias.chunk(num_parts), strict=True
        )
    ]
    if base is linear:
        return parts
    down = F.linear(linear.lora_dropout(x), torch.cat(tuple(linear.matrix_A))) * linear.scaling
    return [
        part + F.linear(low, up)
        for part, low, up in zip(parts, down.chunk(num_parts, dim=-1), linear.matrix_B, strict=True)
    ]
