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
from sgm.modules.diffusionmodules.discretizer import NoiseSchedule
from sgm.modules.diffusionmodules.guiders import Guider
from sgm.util import instantiate_from_config, instantiate_part

# noise(step_index) -> standard normal, like x
NoiseSource = Callable[[int], Tensor]
# callback(step_index, num_steps, x after the step)
StepCallback = Callable[[int, int, Tensor], None]


class SampledStep(NamedTuple):
    """One step of a run that is done.

    Attributes:
        step_index: 0..num_steps-1.
        x: (b, t, c, h, w) float32, the latents after the step; after the last one the result.
        denoised: the same shape, this step's estimate of the result.
    """

    step_index: int
    x: Tensor
    denoised: Tensor


class StepCoefficients(NamedTuple):
    """Factors c of one step: x <- c.x x + c.denoised D + c.previous D_1 + c.noise n.

    D is the estimate of the clean latent at this step, D_1 that of the step before, n fresh
    noise, which is not drawn where its coefficient is 0.
    """

    x: float
    denoised: float
    previous: float = 0.0
    noise: float = 0.0


# The last step of every sampler: no noise is left, so the estimate is the result.
_FINAL_STEP = StepCoefficients(x=0.0, denoised=1.0)


class Sampler(ABC):
    """A linear update rule per step, which subclasses give as coefficients, and the one loop.

    Args:
        num_steps: steps of a run, 2..1000.
        discretization_config, guider_config: nodes of a configuration.

    Attributes:
        schedule: the noise levels; a run goes through them backwards, noisiest first.
        guider: the guidance.

    Raises:
        UserError: `num_steps` is out of range or a node is faulty.
    """

    # Older files ask for a printed progress bar; here a step at a time is handed out.
    IGNORED_PARAMS = frozenset({"verbose"})

    def __init__(
        self,
        num_steps: int,
        discretization_config: Mapping[str, Any],
        *,
        guider_config: Mapping[str, Any],
    ) -> None:
        self._discretization = instantiate_from_config(discretization_config)
        self.schedule: NoiseSchedule = self._discretization(num_steps)
        self.num_steps = len(self.schedule.timesteps)
        needs = ("prepare", "scale_at", "combine")
        self.guider: Guider = instantiate_part(
            guider_config, "sampler_config.params.guider_config", needs=needs
        )

    def adjusted(
        self, *, num_steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampler:
        """A copy for another number of steps, or with another guidance scale.

        The copy's guider gets the number of steps too.

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
        """The update rule of every step, in sampling order; double precision."""

    def levels(self) -> list[float]:
        """The square root of the cumulative alpha per step, in sampling order: 0 first."""
        return self.schedule.alphas_cumprod_sqrt.flip(0).tolist()

    def guidance_scales(self) -> list[float]:
        """The guider's scale per step, in sampling order."""
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
        """Sample latents, a step each time the next one is asked for.

        Nothing in the loop reads a value back from the device, so that the host runs ahead of it.

        Args:
            network: called once per step, with the same conditioning object every time.
            x: (b, t, c, h, w) standard normal; carried in float32 whatever its dtype.
            cond: tensors of b samples.
            uncond: the same for the unconditional branch; only a guider without one does without.
            noise: called with the index of each step that adds noise, in ascending order.

        Yields:
            Each step; its tensors must not be changed in place.
        """
        conditioning = self.guider.prepare(cond, uncond)
        x = x.to(torch.float32)
        # Copied to the device once: row i serves all samples of step i.
        batch = (self.num_steps, x.shape[0])
        timesteps = self.schedule.timesteps.flip(0).to(x.device)[:, None].expand(batch)
        levels = self.schedule.alphas_cumprod_sqrt.flip(0).to(x.device)[:, None].expand(batch)
        steps = zip(self.coefficients(), self.guidance_scales(), strict=True)
        previous: Tensor | None = None
        for step_index, (step, scale) in enumerate(steps):
            denoised = denoiser(
                network,
                x,
                timesteps[step_index],
                conditioning,
                alpha_cumprod_sqrt=levels[step_index],
            )
            # (branches * b, t, c, h, w) -> (b, t, c, h, w)
            denoised = self.guider.combine(denoised, scale)
            x = x * step.x + denoised * step.denoised
            if step.previous:
                x = x + previous * step.previous
            if step.noise:
                x = x + noise(step_index).to(x.dtype) * step.noise
            previous = denoised
            yield SampledStep(step_index, x, denoised)

    def __call__(
        self, *inputs: Any, callback: StepCallback | None = None, **named_inputs: Any
    ) -> Tensor:
        """Sample latents (b, t, c, h, w), float32: all of `steps`, with a callback after each."""
        for step in self.steps(*inputs, **named_inputs):
            if callback is not None:
                callback(step.step_index, self.num_steps, step.x)
        return step.x


class VPSDEDPMPP2MSampler(Sampler):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, DPM-Solver++, section 5 and appendix).

    Second order in the estimates, stochastic: every step but the last adds noise.
    """

    def coefficients(self) -> list[StepCoefficients]:
        """Second-order steps, with two exceptions that follow from the formulas unclamped.

        The first step leaves pure noise, log-SNR minus infinity, so its h is infinite: x has no
        part in it, and the second step gives no weight to its estimate.
        """
        steps = []
        h_last: float | None = None
        for level, level_next in pairwise(self.levels()):
            h = _half_log_snr(level_next) - _half_log_snr(level)
            noise_ratio = _noise_share(level_next) / _noise_share(level)
            weight = -math.expm1(-2.0 * h) * level_next
            extrapolation = 0.0 if h_last is None else h / (2.0 * h_last)  # 1 / 2r, r = h_last / h
            steps.append(
                StepCoefficients(
                    x=noise_ratio * math.exp(-h),
                    denoised=weight * (1.0 + extrapolation),
                    previous=-weight * extrapolation,
                    noise=_noise_share(level_next) * math.sqrt(-math.expm1(-2.0 * h)),
                )
            )
            h_last = h
        return [*steps, _FINAL_STEP]


class VideoDDIMSampler(Sampler):
    """DDIM without noise (Song et al. 2020, eq. 12 with sigma = 0).

    The noise that x and the estimate imply is kept and mixed at the next noise level.
    """

    def coefficients(self) -> list[StepCoefficients]:
        """The last step is the same rule at a next level of 1: it returns the estimate."""
        steps = []
        for level, level_next in pairwise(self.levels()):
            kept = _noise_share(level_next) / _noise_share(level)
            steps.append(StepCoefficients(x=kept, denoised=level_next - level * kept))
        return [*steps, _FINAL_STEP]


def _noise_share(level: float) -> float:
    return math.sqrt(1.0 - level * level)


def _half_log_snr(level: float) -> float:
    """Lambda of the DPM-Solver papers: log(sqrt(alpha) / sqrt(1 - alpha)), -inf without signal."""
    return math.log(level / _noise_share(level)) if level > 0.0 else -math.inf
