"""Decoding on several processes against one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arguments import parse_config
from sgm.config import SamplingArgs
from sgm.parallel.decoding import decode_together
from sgm.sat_runtime import ensure_process_groups
from sgm.util import instantiate_from_config
from tests.conftest import OLD_NAMES
from tests.parallel.processes import run_ranks


def compare(rank: int, world_size: int, num_latent_frames: int) -> int:
    """Return 0 if the first process gets the chunks of a single process, and the others none."""
    ensure_process_groups()
    torch.manual_seed(0)
    node = parse_config(SamplingArgs, "", ["--base", str(OLD_NAMES)]).model["first_stage_config"]
    first_stage = instantiate_from_config(node).eval().requires_grad_(False)
    z = torch.randn(1, 4, num_latent_frames, 2, 3)
    expected = list(first_stage.decode_streamed(z))
    calls = []
    first_stage.decoder.register_forward_hook(lambda *call: calls.append(call))
    found = decode_together(first_stage, z, group=torch.distributed.group.WORLD)
    assert len(calls) == -(-len(expected) // world_size)
    assert len(found) == (len(expected) if rank == 0 else 0)
    assert rank > 0 or all(map(torch.equal, found, expected))
    return 0


@pytest.mark.parametrize(
    ("world_size", "num_latent_frames"),
    [
        (2, 7),  # 3 chunks in two rounds; one process has no chunk in the second
        (2, 1),
        (4, 13),  # 6 chunks
    ],
)
def test_chunks_are_those_of_one_process_to_the_bit(
    world_size: int, num_latent_frames: int, tmp_path: Any
) -> None:
    codes = run_ranks(compare, world_size, world_size, num_latent_frames, log=tmp_path / "log")
    said = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert codes == [0] * world_size, "\n".join(said)
