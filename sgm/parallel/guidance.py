"""Guidance whose branches are evaluated by a process each."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from sgm.modules.diffusionmodules.denoiser import Conditioning
from sgm.modules.diffusionmodules.guiders import Guider


class SplitGuider(Guider):
    """A guider of which this process denoises one branch and learns the others from its group.

    To a sampler it is a guider of a single branch, whose `combine` gives every process the same.

    Args:
        guider: what says how branches are made and combined.
        group: as many processes as it has branches; the first takes the first branch.
    """

    num_branches = 1

    def __init__(self, guider: Guider, group: distributed.ProcessGroup) -> None:
        assert group.size() == guider.num_branches, (group.size(), guider.num_branches)
        self.guider = guider
        self.group = group

    @property
    def num_steps(self) -> int:
        """The guider's own number of steps, if it has one."""
        return self.guider.num_steps

    def prepare(self, cond: Conditioning, uncond: Conditioning | None) -> Conditioning:
        """The conditioning of this process's branch."""
        rank, size = self.group.rank(), self.group.size()
        batched = self.guider.prepare(cond, uncond)
        return {name: value.chunk(size)[rank] for name, value in batched.items()}

    def scale_at(self, timestep: int, num_steps: int) -> float:
        """The guider's scale."""
        return self.guider.scale_at(timestep, num_steps)

    def combine(self, denoised: Tensor, scale: float) -> Tensor:
        """This process's branch (b, t, c, h, w) -> what the guider makes of all branches."""
        denoised = denoised.contiguous()
        branches = [torch.empty_like(denoised) for _ in range(self.group.size())]
        distributed.all_gather(branches, denoised, group=self.group)
        return self.guider.combine(torch.cat(branches), scale)

    def adjusted(self, *, scale: float | None = None, num_steps: int | None = None) -> Guider:
        """The adjusted guider, divided among the same processes."""
        return SplitGuider(self.guider.adjusted(scale=scale, num_steps=num_steps), self.group)
