"""An exponential moving average of the trained weights, beside any optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgm.training.deepspeed_engine import gathered


class WeightAverage:
    """Float32 averages of weights, kept by rank 0 on the weights' device.

    After step n, average ← d · average + (1 − d) · weight with d = min(decay, (1 + n)/(10 + n)):
    the ramp keeps the starting weights from lingering (Tensorflow's ExponentialMovingAverage,
    ``num_updates``).

    Args:
        wrapped: DeepSpeed's engine.
        weights: the trained weights by name.
        decay: in [0, 1), usually 0.999 to 0.9999.
        keeps: whether this process is rank 0; the others only take part where ZeRO-3 gathers.
    """

    def __init__(
        self, wrapped: Any, weights: Mapping[str, nn.Parameter], *, decay: float, keeps: bool
    ) -> None:
        self.wrapped = wrapped
        self.weights = dict(weights)
        self.decay = decay
        self.keeps = keeps
        self.averages: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            with gathered(wrapped, [weight]):
                if keeps:
                    self.averages[name] = weight.detach().float().clone()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`, counted from 1; all processes must call it."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in self.weights.items():
            with gathered(self.wrapped, [weight]):
                if self.keeps:
                    self.averages[name].lerp_(weight.detach().float(), 1 - decay)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Go on from stored averages; names and shapes are those of the weights."""
        for name, average in averages.items():
            if self.keeps:
                self.averages[name].copy_(average)
