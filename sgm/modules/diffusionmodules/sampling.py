"""Samplers, which denoise a latent step by step along a schedule of noise levels."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgm.modules.diffusionmodules.denoiser import Conditioning, DiscreteDenoiser, Network
from sgm.modules.diffusionmodules.discretizer import NoiseLevels
from sgm.modules.diffusionmodules.guiders import Guider
from sgm.util import instantiate_from_config, instantiate_part

# noise(step_index) -> standard normal noise with the shape of x
NoiseSource = Callable[[int], Tensor]


class SampledStep(NamedTuple):
    """The state after one sampling step.

    Attributes:
        step_index: 0..num_steps-1.
        x: (b, t, c, h, w) float32, the latents after the step. After the last step they are the
            result.
        denoised: the estimate of the clean latents at this step, with the shape of `x`.
    """

    step_index: int
    x: Tensor
    denoised: Tensor


class StepCoefficients(NamedTuple):
    """Coefficients c of one step: x <- c.x x + c.denoised D + c.previous D_1 + c.noise n.

    D is the estimate of the clean latent at this step, D_1 is the estimate at the previous step,
    and n is new noise. No noise is drawn if its coefficient is 0.
    """

    x: float
    denoised: float
    previous: float = 0.0
    noise: float = 0.0


# The last step of every sampler: no noise remains, so the estimate is the result.
_FINAL_STEP = StepCoefficients(x=0.0, denoised=1.0)


class Sampler(ABC):
    """The sampling loop. Each step is a linear update; subclasses define its coefficients.

    Args:
        num_steps: number of sampling steps, 2..1000.
        discretization_config: configuration node of the discretization, which makes the schedule.
        guider_config: configuration node of the guider.

    Attributes:
        schedule: the noise levels, cleanest first; sampling goes through them in reverse order.
        guider: the guider.

    Raises:
        UserError: `num_steps` is out of range or a node is invalid.
    """

    # In older files, `verbose` prints a progress bar; here the caller of `steps` shows progress.
    IGNORED_PARAMS = frozenset({"verbose"})

    def __init__(
        self,
        num_steps: int,
        discretization_config: Mapping[str, Any],
        *,
        guider_config: Mapping[str, Any],
    ) -> None:
        self._discretization = instantiate_from_config(discretization_config)
        self.schedule: NoiseLevels = self._discretization(num_steps)
        self.num_steps = len(self.schedule.timesteps)
        where, needs = "sampler_config.params.guider_config", ("prepare", "scale_at", "combine")
        self.guider: Guider = instantiate_part(guider_config, where, needs=needs)

    def adjusted(
        self, *, num_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """Return a copy with another number of steps or another guidance scale.

        The copy's guider gets the new number of steps too.

        Raises:
            UserError: a value is out of range, or the guider has no scale.
        """
        sampler = copy.copy(self)
        if num_steps is not None:
            sampler.schedule = self._discretization(num_steps)
            sampler.num_steps = len(sampler.schedule.timesteps)
        sampler.guider = self.guider.adjusted(scale=guidance_scale, num_steps=num_steps)
        return sampler

    @abstractmethod
    def coefficients(self) -> list[StepCoefficients]:
        """Return the coefficients of each step, in sampling order, in double precision."""

    def noise_levels(self) -> list[float]:
        """Return the `alpha_cumprod_sqrt` of each step, in sampling order; the first is 0."""
        return self.schedule.alphas_cumprod_sqrt.flip(0).tolist()

    def guidance_scales(self) -> list[float]:
        """Return the guidance scale of each step, in sampling order."""
        timesteps = self.schedule.timesteps.flip(0).tolist()
        return [self.guider.scale_at(timestep, self.num_steps) for timestep in timesteps]

    @torch.no_grad()
    def steps(
        self,
        network: Network,
        denoiser: DiscreteDenoiser,
        x: Tensor,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        *,
        noise: NoiseSource,
    ) -> Iterator[SampledStep]:
        """Sample latents, one step per iteration of the generator.

        The loop never reads a value from the device, so the host does not wait for the device.

        Args:
            network: called once per step, with the same conditioning object every time.
            denoiser: turns the output of the network into an estimate of the clean latent.
            x: (b, t, c, h, w) standard normal noise; converted to float32.
            cond: conditioning of b samples.
            uncond: conditioning of the unconditional branch for the same samples; None is allowed
                only if the guider has no unconditional branch.
            noise: called with the index of each step that adds noise, in ascending order.

        Yields:
            The state after each step; its tensors must not be changed in place.
        """
        conditioning = self.guider.prepare(cond, uncond)
        x = x.to(torch.float32)
        # Copied to the device once. Row i holds the values of step i, one per sample.
        timesteps, levels = (
            values.flip(0).to(x.device)[:, None].expand(-1, len(x)) for values in self.schedule
        )
        steps = zip(self.coefficients(), self.guidance_scales(), timesteps, levels, strict=True)
        previous: Tensor | None = None
        for step_index, (step, scale, timestep, level) in enumerate(steps):
            denoised = denoiser(network, x, timestep, conditioning, alpha_cumprod_sqrt=level)
            # (branches * b, t, c, h, w) -> (b, t, c, h, w)
            denoised = self.guider.combine(denoised, scale)
            x = x * step.x + denoised * step.denoised
            if step.previous:
                x = x + previous * step.previous
            if step.noise:
                x = x + noise(step_index).to(x.dtype) * step.noise
            previous = denoised
            yield SampledStep(step_index, x, denoised)


class VPSDEDPMPP2MSampler(Sampler):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, DPM-Solver++, section 5 and appendix).

    The solver is of second order, because it uses the estimates of two steps. It is stochastic:
    every step except the last adds noise.
    """

    def coefficients(self) -> list[StepCoefficients]:
        """Return second-order coefficients; the first two steps and the last are of first order.

        The formulas handle the first two steps without clamping. The first step starts from pure
        noise, where the log-SNR is minus infinity and h is therefore infinite. So its coefficient
        of x is 0, and the second step gives no weight to the first step's estimate.
        """
        steps = []
        h_last: float | None = None
        for level, level_next in pairwise(self.noise_levels()):
            h = _half_log_snr(level_next) - _half_log_snr(level)
            noise_ratio = _noise_factor(level_next) / _noise_factor(level)
            weight = -math.expm1(-2.0 * h) * level_next
            extrapolation = 0.0 if h_last is None else h / (2.0 * h_last)  # 1 / 2r, r = h_last / h
            steps.append(
                StepCoefficients(
                    x=noise_ratio * math.exp(-h),
                    denoised=weight * (1.0 + extrapolation),
                    previous=-weight * extrapolation,
                    noise=_noise_factor(level_next) * math.sqrt(-math.expm1(-2.0 * h)),
                )
            )
            h_last = h
        return [*steps, _FINAL_STEP]


class VideoDDIMSampler(Sampler):
    """Deterministic DDIM (Song et al. 2020, eq. 12 with sigma = 0).

    x and the estimate imply a noise; the step combines this noise with the estimate at the next
    noise level.
    """

    def coefficients(self) -> list[StepCoefficients]:
        """Return the coefficients of each step; the last step returns the estimate itself."""
        steps = []
        for level, level_next in pairwise(self.noise_levels()):
            kept = _noise_factor(level_next) / _noise_factor(level)
            steps.append(StepCoefficients(x=kept, denoised=level_next - level * kept))
        return [*steps, _FINAL_STEP]


def _noise_factor(level: float) -> float:
    return math.sqrt(1.0 - level * level)


def _half_log_snr(level: float) -> float:
    """Return lambda of the DPM-Solver papers: log(level / sqrt(1 - level^2)); -inf at level 0."""
    return math.log(level / _noise_factor(level)) if level > 0.0 else -math.inf
