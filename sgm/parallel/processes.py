"""Processes that make a video together: how they divide the work and handle errors."""

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

# While the first process writes a video, the other processes wait in the first step of the next
# video.
PATIENCE = timedelta(hours=12)


class LostProcessError(UserError):
    """This process failed in work for which all processes are needed."""


def share_sampling(network: DiffusionTransformer, sampler: Sampler) -> None:
    """Split each sampling step among all processes of the default group.

    `network` and `sampler` are changed in place. Every process must call this function, and later
    the sampler, with the same arguments and noise; all processes get the same result. If the number
    of processes is divisible by the number of guidance branches, the processes are divided into one
    part per branch. The processes of a part split the tokens.

    Raises:
        UserError: a part has more processes than there are attention heads.
    """
    size = distributed.get_world_size()
    branches = sampler.guider.num_branches
    if size % branches:
        branches = 1
    parts = torch.arange(size).view(branches, -1).tolist()  # neighbouring ranks split the tokens
    if len(parts[0]) > network.num_heads:
        raise UserError(
            f"parallel: video splits {network.num_heads} attention heads among the processes, but "
            f"that is too few heads for {size} processes; start at most "
            f"{branches * network.num_heads}"
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
    """Mark work that all processes do at the same time, and convert errors in this context.

    A process that fails here must exit: torchrun then ends the other processes, which would
    otherwise wait for this process. Without `together`, errors are raised unchanged.

    Raises:
        LostProcessError: an error was raised within the context, and `together` is true.
    """
    try:
        yield
    except Exception as error:
        if not together:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LostProcessError(
            f"process {distributed.get_rank()} failed, and the others cannot make videos without "
            f"it: {reason}"
        ) from error
