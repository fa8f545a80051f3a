"""An exponential moving average of the trained weights, for any optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sgm.distributed import is_main
from sgm.training.deepspeed_engine import gathered, trained_weights

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class WeightAverage:
    """Float32 averages of the trained weights, kept by rank 0 on the weights' device.

    After step n, average ← d · average + (1 − d) · weight with d = min(decay, (1 + n)/(10 + n)).
    The smaller d of the first steps lets the starting weights fade quickly (Tensorflow's
    ExponentialMovingAverage, ``num_updates``). Other ranks only take part where ZeRO-3 gathers
    weights; their `averages` are empty.

    Args:
        wrapped: DeepSpeed's engine.
        decay: in [0, 1), usually 0.999 to 0.9999.
    """

    def __init__(self, wrapped: DeepSpeedEngine, decay: float) -> None:
        self.wrapped = wrapped
        self.weights = trained_weights(wrapped.module)
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            with gathered(wrapped, [weight]):
                if is_main():
                    self.averages[name] = weight.detach().float().clone()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after `step`, counted from 1; all processes must call it."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in self.weights.items():
            with gathered(self.wrapped, [weight]):
                if name in self.averages:
                    self.averages[name].lerp_(weight.detach().float(), 1 - decay)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Continue from stored averages; names and shapes are those of the weights."""
        for name, average in averages.items():
            self.averages[name].copy_(average)
