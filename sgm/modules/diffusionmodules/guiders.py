"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from sgm.errors import UserError
from sgm.modules.diffusionmodules.denoiser import Conditioning
from sgm.util import check_number


class Guider:
    """The interface of all guiders. This base class itself does not guide.

    A sampler calls `prepare` once. At every step it denoises its latents for all branches in one
    forward pass and passes the result to `combine`.

    Attributes:
        num_branches: number of conditionings for which each sample is denoised.
        scale: strength of the guidance; None for a guider without a scale.
        num_steps: number of steps for which the scale is designed; None if the scale does not
            depend on the number of steps.
    """

    num_branches = 1
    scale: float | None = None
    num_steps: int | None = None

    def prepare(self, cond: Conditioning, uncond: Conditioning | None) -> Conditioning:
        """Return the conditioning of all branches, concatenated along the batch axis."""
        return cond

    def scale_at(self, timestep: int, num_steps: int) -> float:
        """Return the guidance scale at `timestep` (0..999) in a run with `num_steps` steps."""
        return 1.0

    def combine(self, denoised: Tensor, scale: float) -> Tensor:
        """Combine the branches' estimates, (num_branches * b, t, c, h, w) -> (b, t, c, h, w)."""
        return denoised

    def adjusted(self, *, scale: float | None = None, num_steps: int | None = None) -> Guider:
        """Return a copy with another scale or another number of steps.

        `num_steps` has no effect on a guider whose scale does not depend on the number of steps.

        Raises:
            UserError: `scale` is not a finite number, or the guider has no scale.
        """
        guider = copy.copy(self)
        if scale is not None:
            if self.scale is None:
                raise UserError(
                    f"guidance_scale={scale}: {type(self).__name__} has no scale; use another "
                    "guider_config in the configuration"
                )
            check_number("guidance_scale", scale)
            guider.scale = float(scale)
        if num_steps is not None and self.num_steps is not None:
            guider.num_steps = num_steps
        return guider


class IdentityGuider(Guider):
    """No guidance: only the conditional estimate is computed, which halves the work."""


class VanillaCFG(Guider):
    """Guidance with a constant scale: uncond + scale * (cond - uncond).

    Args:
        scale: 0 ignores the prompt, 1 is no guidance.

    Raises:
        UserError: `scale` is not a finite number.
    """

    num_branches = 2
    scale: float

    def __init__(self, scale: float) -> None:
        check_number(f"{type(self).__name__}: scale", scale)
        self.scale = float(scale)

    def prepare(self, cond: Conditioning, uncond: Conditioning | None) -> Conditioning:
        """Return both conditionings as one batch, the unconditional one first.

        Raises:
            ValueError: `uncond` is missing.
        """
        if uncond is None:
            raise ValueError(f"{type(self).__name__} needs an unconditional conditioning")
        return {name: torch.cat([uncond[name], cond[name]]) for name in cond}

    def scale_at(self, timestep: int, num_steps: int) -> float:
        """Return the constant scale."""
        return self.scale

    def combine(self, denoised: Tensor, scale: float) -> Tensor:
        """Combine the estimates (2b, t, c, h, w), unconditional first, into (b, t, c, h, w)."""
        uncond, cond = denoised.chunk(2)
        return uncond + scale * (cond - uncond)


class DynamicCFG(VanillaCFG):
    """Guidance with a scale that follows a raised cosine between 1 and 1 + scale.

    The formula is copied from the sampler of the released weights. It uses the timestep (0..999)
    where one would expect the step index. This has two effects: the scale is not monotone over a
    run but jumps between its bounds, and it depends on the number of steps of both the run and the
    guider.

    Args:
        scale: the height of the cosine; 0 means no guidance.
        exp: the exponent, a whole number 1..100. A fraction is not allowed, because the base is
            negative at most timesteps.
        num_steps: the guider's number of steps, usually the same as the sampler's.

    Raises:
        UserError: a value is out of range.
    """

    num_steps: int

    def __init__(self, scale: float, exp: float, *, num_steps: int) -> None:
        super().__init__(scale)
        check_number("DynamicCFG: exp", exp, low=1, high=100, whole=True)
        check_number("DynamicCFG: num_steps", num_steps, low=1, high=1000, whole=True)
        self.exp = int(exp)
        self.num_steps = int(num_steps)

    def scale_at(self, timestep: int, num_steps: int) -> float:
        """Return 1 + scale (1 - cos(pi ((num_steps - timestep) / self.num_steps)^exp)) / 2.

        Double precision is needed: the argument of the cosine reaches 1e10 pi, where float32
        cannot represent fractions of a period.
        """
        progress = (num_steps - timestep) / self.num_steps
        return 1.0 + self.scale * (1.0 - math.cos(math.pi * progress**self.exp)) / 2.0
