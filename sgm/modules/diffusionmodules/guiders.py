"""Classifier-free guidance (Ho & Salimans 2022): what is evaluated, and how it is combined."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sgm.errors import UserError
from sgm.modules.diffusionmodules.denoiser import Conditioning
from sgm.util import check_number


class Guider(ABC):
    """What a sampler needs of guidance.

    A sampler calls `prepare` once, then at every step denoises its latents under all branches in
    one forward and hands the result to `combine`.
    """

    num_branches: int

    @abstractmethod
    def prepare(self, cond: Conditioning, uncond: Conditioning | None) -> Conditioning:
        """The conditioning of the batched forward, `num_branches` times as many samples."""

    @abstractmethod
    def scale_at(self, timestep: int, num_steps: int) -> float:
        """The guidance scale at `timestep` (0..999) of a run of `num_steps` steps."""

    @abstractmethod
    def combine(self, denoised: Tensor, scale: float) -> Tensor:
        """(num_branches * b, t, c, h, w) -> (b, t, c, h, w)."""

    def adjusted(self, *, scale: float | None = None, num_steps: int | None = None) -> Guider:
        """A copy with another scale, or for runs of another number of steps.

        This one is for guiders that have neither.

        Raises:
            UserError: a value is out of range, or the guider has no scale.
        """
        if scale is not None:
            raise UserError(
                f"guidance_scale={scale}: {type(self).__name__} has no scale; use another "
                "guider_config in the configuration"
            )
        return self


class IdentityGuider(Guider):
    """No guidance: the conditional estimate alone, for half the work."""

    num_branches = 1

    def prepare(self, cond: Conditioning, uncond: Conditioning | None) -> Conditioning:
        """`cond` as it is; `uncond` is not looked at."""
        return cond

    def scale_at(self, timestep: int, num_steps: int) -> float:
        """1, the scale at which guidance is the conditional estimate."""
        return 1.0

    def combine(self, denoised: Tensor, scale: float) -> Tensor:
        """`denoised` as it is."""
        return denoised


class VanillaCFG(Guider):
    """uncond + scale * (cond - uncond) with a constant scale, both from one batched forward.

    Args:
        scale: 0 ignores the prompt, 1 is no guidance.

    Raises:
        UserError: it is not a finite number.
    """

    num_branches = 2

    def __init__(self, scale: float) -> None:
        check_number(f"{type(self).__name__}: scale", scale)
        self.scale = float(scale)

    def prepare(self, cond: Conditioning, uncond: Conditioning | None) -> Conditioning:
        """Both conditionings as one batch, the unconditional one first.

        Raises:
            ValueError: `uncond` is absent or differs from `cond` in its keys or shapes.
        """
        if uncond is None:
            raise ValueError(f"{type(self).__name__} needs an unconditional conditioning")
        shapes = {name: tuple(value.shape) for name, value in cond.items()}
        other = {name: tuple(value.shape) for name, value in uncond.items()}
        if shapes != other:
            raise ValueError(f"conditional {shapes} and unconditional {other} shapes differ")
        return {name: torch.cat([uncond[name], cond[name]]) for name in cond}

    def scale_at(self, timestep: int, num_steps: int) -> float:
        """The constant scale."""
        return self.scale

    def combine(self, denoised: Tensor, scale: float) -> Tensor:
        """(2b, t, c, h, w), unconditional first -> (b, t, c, h, w)."""
        uncond, cond = denoised.chunk(2)
        return uncond + scale * (cond - uncond)

    def adjusted(self, *, scale: float | None = None, num_steps: int | None = None) -> Guider:
        """A copy with another scale; no number of steps changes it."""
        guider = copy.copy(self)
        if scale is not None:
            check_number("guidance_scale", scale)
            guider.scale = float(scale)
        return guider


class DynamicCFG(VanillaCFG):
    """Guidance whose scale runs along a raised cosine between 1 and 1 + scale.

    Kept as the released weights' sampler has it: the cosine's argument takes the timestep (0..999)
    where one would expect the step, so the scale is not monotone over a run but jumps between the
    bounds, and depends on both step numbers: the run's and the guider's own.

    Args:
        scale: the height of the cosine; 0 means no guidance.
        exp: its exponent, a whole number 1..100; its base is negative at most timesteps, so that a
            fraction would have no real power.
        num_steps: the guider's own number of steps, usually the sampler's.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(self, scale: float, exp: float, *, num_steps: int) -> None:
        super().__init__(scale)
        check_number("DynamicCFG: exp", exp, low=1, high=100, whole=True)
        check_number("DynamicCFG: num_steps", num_steps, low=1, high=1000, whole=True)
        self.exp = int(exp)
        self.num_steps = int(num_steps)

    def scale_at(self, timestep: int, num_steps: int) -> float:
        """1 + scale (1 - cos(pi ((num_steps - timestep) / own num_steps)^exp)) / 2.

        In double precision: the argument reaches 1e10 half turns, of which float32 keeps nothing.
        """
        progress = (num_steps - timestep) / self.num_steps
        return 1.0 + self.scale * (1.0 - math.cos(math.pi * progress**self.exp)) / 2.0

    def adjusted(self, *, scale: float | None = None, num_steps: int | None = None) -> Guider:
        """A copy with another height of the cosine, or another own number of steps."""
        guider = super().adjusted(scale=scale)
        if num_steps is not None:
            guider.num_steps = num_steps
        return guider
