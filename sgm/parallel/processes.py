"""Processes that make a video together: how they divide the work, and what an error does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from sgm.errors import UserError
from sgm.models.transformer import DiffusionTransformer
from sgm.modules.diffusionmodules.sampling import Sampler
from sgm.parallel.guidance import SplitGuider

# While the first process decodes and writes a video, the others wait in the next one's first step.
PATIENCE = timedelta(hours=12)


class LostProcessError(UserError):
    """Work that needs all processes failed in this one."""


def share_sampling(network: DiffusionTransformer, sampler: Sampler) -> None:
    """Split each step of `sampler` with `network` among all processes of the default group.

    Every process must call this, and then the sampler, with the same arguments and noise. All get
    the same result. If the number of processes is divisible by the number of branches of guidance,
    each branch is computed by an equal part of the processes. Within a part, the processes split
    the tokens.

    Raises:
        UserError: there are more processes in a part than attention heads.
    """
    size = distributed.get_world_size()
    branches = sampler.guider.num_branches
    if size % branches:
        branches = 1
    parts = torch.arange(size).view(branches, -1).tolist()  # neighbours split the tokens
    if len(parts[0]) > network.num_heads:
        raise UserError(
            f"parallel: video divides {network.num_heads} attention heads among the processes, "
            f"which are too few for {size}; start {branches * network.num_heads} at most"
        )
    if branches > 1:
        pairs = list(zip(*parts, strict=True))
        group, _ = distributed.new_subgroups_by_enumeration(pairs, timeout=PATIENCE)
        sampler.guider = SplitGuider(sampler.guider, group)
    if len(parts[0]) > 1:
        group, _ = distributed.new_subgroups_by_enumeration(parts, timeout=PATIENCE)
        network.split_sequence(group)


@contextmanager
def in_step(*, together: bool) -> Iterator[None]:
    """Context for work that all processes do at the same time, if they work `together`.

    A process that fails here must exit, so that torchrun ends the others, which wait for it.

    Raises:
        LostProcessError: an error was raised within the context.
    """
    try:
        yield
    except Exception as error:
        if not together:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LostProcessError(
            f"process {distributed.get_rank()} stopped, and no video is made without it: {reason}"
        ) from error
