"""The exponential moving average of the trained weights, for any optimizer."""

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
    """Averages the trained weights in float32, on rank 0 and on the device of the weights.

    After step n, average ← d · average + (1 − d) · weight with d = min(decay, (1 + n)/(10 + n)).
    In the first steps d is smaller, so the initial weights fade quickly (as ``num_updates`` in
    TensorFlow's ExponentialMovingAverage). On other ranks `averages` is empty; they only help to
    gather weights that ZeRO-3 shards.

    Args:
        wrapped: DeepSpeed's engine.
        decay: the decay per step, in [0, 1), usually 0.999 to 0.9999.
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
        """Update the averages after `step`, counted from 1; all processes must call this."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in self.weights.items():
            with gathered(self.wrapped, [weight]):
                if name in self.averages:
                    self.averages[name].lerp_(weight.detach().float(), 1 - decay)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Continue from stored averages, which have the names and shapes of the weights."""
        for name, average in averages.items():
            self.averages[name].copy_(average)
