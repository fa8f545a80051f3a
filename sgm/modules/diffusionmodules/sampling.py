"""Samplers: from noise to a latent along a schedule of noise levels."""

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

# noise(step_index) -> standard normal, like x
NoiseSource = Callable[[int], Tensor]


class SampledStep(NamedTuple):
    """The state after one step of a run.

    Attributes:
        step_index: 0..num_steps-1.
        x: (b, t, c, h, w) float32, the latents after the step; after the last step the result.
        denoised: the same shape, the estimate of the result at this step.
    """

    step_index: int
    x: Tensor
    denoised: Tensor


class StepCoefficients(NamedTuple):
    """Factors c of one step: x <- c.x x + c.denoised D + c.previous D_1 + c.noise n.

    D is the estimate of the clean latent at this step, D_1 the estimate at the previous step, and
    n is new noise, which is not drawn if its coefficient is 0.
    """

    x: float
    denoised: float
    previous: float = 0.0
    noise: float = 0.0


# The last step of every sampler: no noise remains, so the estimate is the result.
_FINAL_STEP = StepCoefficients(x=0.0, denoised=1.0)


class Sampler(ABC):
    """The loop of a sampler. Each step is a linear update; subclasses give its coefficients.

    Args:
        num_steps: steps of a run, 2..1000.
        discretization_config, guider_config: nodes of a configuration.

    Attributes:
        schedule: the noise levels; a run goes through them backwards, noisiest first.
        guider: the guidance.

    Raises:
        UserError: `num_steps` is out of range or a node is invalid.
    """

    # In older files it turns on a printed progress bar; here the caller of `steps` reports.
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

        The guider of the copy gets the number of steps too.

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
        """Return the coefficients of every step, in sampling order, in double precision."""

    def noise_levels(self) -> list[float]:
        """Return the square root of the cumulative alpha per step, in sampling order: 0 first."""
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

        The loop never reads a value from the device, so that the host can run ahead of it.

        Args:
            network: called once per step, with the same conditioning object every time.
            denoiser: turns the output of the network into an estimate of the clean latent.
            x: (b, t, c, h, w) standard normal; converted to float32.
            cond: tensors of b samples.
            uncond: the same for the unconditional branch; None only if the guider has none.
            noise: called with the index of each step that adds noise, in ascending order.

        Yields:
            The state after each step; its tensors must not be changed in place.
        """
        conditioning = self.guider.prepare(cond, uncond)
        x = x.to(torch.float32)
        # Copied to the device once: row i serves all samples of step i.
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

    It is of second order in the estimates and stochastic: every step but the last adds noise.
    """

    def coefficients(self) -> list[StepCoefficients]:
        """Return coefficients of second order, except for the first two steps.

        The exceptions follow from the formulas without clamping. The first step starts from pure
        noise, where the log-SNR is minus infinity. So its h is infinite: the coefficient of x is 0,
        and the second step gives its estimate no weight.
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

    The noise implied by x and the estimate is kept, and mixed again at the next noise level.
    """

    def coefficients(self) -> list[StepCoefficients]:
        """Return the coefficients; the last step has a next noise level of 1: the estimate."""
        steps = []
        for level, level_next in pairwise(self.noise_levels()):
            kept = _noise_factor(level_next) / _noise_factor(level)
            steps.append(StepCoefficients(x=kept, denoised=level_next - level * kept))
        return [*steps, _FINAL_STEP]


def _noise_factor(level: float) -> float:
    return math.sqrt(1.0 - level * level)


def _half_log_snr(level: float) -> float:
    """Lambda of the DPM-Solver papers: log(sqrt(alpha) / sqrt(1 - alpha)); -inf without signal."""
    return math.log(level / _noise_factor(level)) if level > 0.0 else -math.inf
