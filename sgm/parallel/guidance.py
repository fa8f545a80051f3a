"""Classifier-free guidance in which each process evaluates one branch."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from sgm.modules.diffusionmodules.denoiser import Conditioning
from sgm.modules.diffusionmodules.guiders import Guider


class SplitGuider(Guider):
    """A guider for a process that denoises one branch and receives the other branches.

    The sampler sees a guider with a single branch. `combine` returns the same on all processes.

    Args:
        guider: the guider that defines the branches and how they are combined.
        group: one process per branch, in the order of the branches.
    """

    num_branches = 1

    def __init__(self, guider: Guider, group: distributed.ProcessGroup) -> None:
        assert group.size() == guider.num_branches, (group.size(), guider.num_branches)
        self.guider = guider
        self.group = group

    def prepare(self, cond: Conditioning, uncond: Conditioning | None) -> Conditioning:
        """Return the conditioning of this process's branch."""
        rank, size = self.group.rank(), self.group.size()
        batched = self.guider.prepare(cond, uncond)
        return {name: value.chunk(size)[rank] for name, value in batched.items()}

    def scale_at(self, timestep: int, num_steps: int) -> float:
        """Return the guidance scale of the wrapped guider."""
        return self.guider.scale_at(timestep, num_steps)

    def combine(self, denoised: Tensor, scale: float) -> Tensor:
        """Combine the branches of all processes; `denoised` is this process's, (b, t, c, h, w)."""
        denoised = denoised.contiguous()
        branches = [torch.empty_like(denoised) for _ in range(self.group.size())]
        distributed.all_gather(branches, denoised, group=self.group)
        return self.guider.combine(torch.cat(branches), scale)

    def adjusted(self, *, scale: float | None = None, num_steps: int | None = None) -> Guider:
        """Adjust the wrapped guider and return it, split among the same processes."""
        return SplitGuider(self.guider.adjusted(scale=scale, num_steps=num_steps), self.group)
