"""The processes that make a video together: who does what, and what happens if one fails."""

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

# The first process decodes and writes a video while the others wait in the next one's first step.
_PATIENCE = timedelta(hours=12)


class LostProcess(UserError):
    """This process failed in work that the others cannot do without it."""


def share_sampling(network: DiffusionTransformer, sampler: Sampler) -> None:
    """Divide each step of `sampler` with `network` among all processes of the default group.

    Every process calls this, and afterwards the sampler, with the same arguments and noise; the
    result is the same on all. The branches of guidance go to a part of the processes each, if their
    number allows it, and within such a part the processes share the tokens.

    Raises:
        UserError: a process would have no head of the attention.
    """
    size = distributed.get_world_size()
    branches = sampler.guider.num_branches
    if size % branches:
        branches = 1
    parts = torch.arange(size).view(branches, -1).tolist()  # neighbours share tokens
    if len(parts[0]) > network.num_heads:
        raise UserError(
            f"parallel: video divides {network.num_heads} attention heads among the processes, too "
            f"few for {size}; start {branches * network.num_heads} at most"
        )
    if branches > 1:
        pairs = list(zip(*parts, strict=True))
        group, _ = distributed.new_subgroups_by_enumeration(pairs, timeout=_PATIENCE)
        sampler.guider = SplitGuider(sampler.guider, group)
    if len(parts[0]) > 1:
        group, _ = distributed.new_subgroups_by_enumeration(parts, timeout=_PATIENCE)
        network.split_sequence(group)


def group_of_all() -> distributed.ProcessGroup:
    """All processes, as a group with the patience that making videos takes."""
    everyone = [list(range(distributed.get_world_size()))]
    group, _ = distributed.new_subgroups_by_enumeration(everyone, timeout=_PATIENCE)
    return group


@contextmanager
def in_step(*, together: bool) -> Iterator[None]:
    """Work that all processes do at the same time, if they work `together`.

    Whichever fails there must end, upon which torchrun ends the others: they would wait for it.

    Raises:
        LostProcess: anything was raised within.
    """
    try:
        yield
    except Exception as error:
        if not together:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LostProcess(
            f"process {distributed.get_rank()} stopped, and no video is made without it: {reason}"
        ) from error
