"""Sampling by several processes gives the latents of one process, and the work is split."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from arguments import parse_config
from sgm.config import SamplingArgs
from sgm.distributed import SequenceShard
from sgm.errors import UserError
from sgm.models.transformer import DiffusionTransformer
from sgm.modules.diffusionmodules.guiders import IdentityGuider
from sgm.modules.diffusionmodules.sampling import Sampler
from sgm.modules.transformer.attention import Kernel
from sgm.parallel.processes import share_sampling
from sgm.sat_runtime import ensure_process_groups
from sgm.util import instantiate_from_config
from tests.conftest import OLD_NAMES
from tests.models.conftest import fill_with_noise, small_transformer_config
from tests.parallel.processes import run_ranks
from tests.plain_attention import replace_kernels

NUM_TEXT, NUM_VIDEO = 10, 3 * 4 * 6
SHARED_TOKENS = {2: [82, 82], 3: [28, 27, 27], 4: [41, 41, 41, 41]}  # of the sum, 82


def sample(network: DiffusionTransformer, sampler: Sampler, denoiser: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def double(x: Tensor, timesteps: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return network(x.double(), timesteps, context=cond["crossattn"].double())

    cond, uncond = ({"crossattn": draw(1, NUM_TEXT, 48)} for _ in range(2))
    noise = draw(3, 1, 3, 16, 8, 12)
    inputs = (double, denoiser, noise[0], cond, uncond)
    *_, last = sampler.steps(*inputs, noise=lambda index: noise[index + 1])
    return last.x


def compare(rank: int, world_size: int, guided: bool, compiled: bool, kernel: Kernel) -> int:
    """Return 0 if this process gets the latents of a single one and does its part of the work."""
    replace_kernels(pytest.MonkeyPatch())
    ensure_process_groups()
    # Double precision: a product with fewer rows may be summed in another order.
    network = DiffusionTransformer(**small_transformer_config(num_attention_heads=4)).double()
    fill_with_noise(network)
    network.set_attention(kernel)
    nodes = parse_config(SamplingArgs, "", ["--base", str(OLD_NAMES)]).model
    denoiser, sampler = (
        instantiate_from_config(nodes[f"{part}_config"]) for part in ("denoiser", "sampler")
    )
    if not guided:
        sampler.guider = IdentityGuider()
    expected = sample(network, sampler, denoiser)

    share_sampling(network, sampler)
    blocks = network.mixins["adaln_layer"]
    run_block, shapes = blocks._run_block, set()
    if compiled:
        run_block = torch.compile(run_block, backend="aot_eager", dynamic=False, fullgraph=True)

    def record(tokens: Tensor, *inputs: Any, **settings: Any) -> Tensor:
        shapes.add(tuple(tokens.shape))
        return run_block(tokens, *inputs, **settings)

    blocks._run_block = record
    found = sample(network, sampler, denoiser)
    branches = 2 if guided and world_size % 2 else 1
    num_tokens = SHARED_TOKENS[world_size][rank] if guided else 41
    assert shapes == {(branches, num_tokens, 64)}, shapes
    # With this kernel, a single process joins the first block's attention from parts.
    tolerance = 1e-10 if kernel != "sdpa" and guided else 0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    return 0


@pytest.mark.parametrize(
    ("world_size", "guided", "compiled", "kernel"),
    [
        (2, True, False, "sdpa"),  # guidance alone is divided
        (2, False, True, "sdpa"),  # tokens alone, in a block that is one graph
        (3, True, False, "sdpa"),  # guidance cannot be split; 82 tokens and 4 heads are uneven
        (3, True, False, "hopper"),
        (4, True, False, "sdpa"),  # both
    ],
)
def test_latents_equal_those_of_one_process(
    world_size: int, guided: bool, compiled: bool, kernel: Kernel, tmp_path: Any
) -> None:
    arguments = (world_size, guided, compiled, kernel)
    codes = run_ranks(compare, world_size, *arguments, log=tmp_path / "log")
    said = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert codes == [0] * world_size, "\n".join(said)


def test_text_may_end_in_any_process() -> None:
    def own_text(length: int) -> list[int]:
        shards = (SequenceShard(None, rank, (4, 3, 3), (2, 1, 1)) for rank in range(3))
        return [shard.own_text_length(length) for shard in shards]

    assert own_text(2) == [2, 0, 0]
    assert own_text(6) == [4, 2, 0]
    assert own_text(8) == [4, 3, 1]


def test_more_processes_than_heads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 10)
    sampler = SimpleNamespace(guider=SimpleNamespace(num_branches=2))
    with pytest.raises(UserError, match="4 attention heads.*start at most 8"):
        share_sampling(SimpleNamespace(num_heads=4), sampler)
