"""Drawn noise levels: range, strata over ranks, generators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sgm.errors import UserError
from sgm.modules.diffusionmodules import sigma_sampling
from sgm.modules.diffusionmodules.sigma_sampling import DiscreteSampling
from sgm.util import instantiate_from_config


@pytest.fixture
def make_sampling(make_node: Callable[..., dict]) -> Callable[..., DiscreteSampling]:
    def make(*, num_idx: int = 1000, uniform_sampling: bool = True) -> DiscreteSampling:
        discretization = make_node("discretizer.ZeroSNRDDPMDiscretization", shift_scale=3.0)
        return instantiate_from_config(
            make_node(
                "sigma_sampling.DiscreteSampling",
                num_idx=num_idx,
                uniform_sampling=uniform_sampling,
                discretization_config=discretization,
            )
        )

    return make


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend to be rank r of R."""

    def pretend(rank: int, size: int) -> None:
        monkeypatch.setattr(sigma_sampling, "data_parallel_rank_and_size", lambda: (rank, size))

    return pretend


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_each_rank_draws_from_its_own_part_and_all_ranks_uniformly(
    make_sampling: Callable[..., DiscreteSampling],
    as_rank: Callable[[int, int], None],
    num_ranks: int,
) -> None:
    sampling = make_sampling(num_idx=10)
    num_draws, counts = 30_000, torch.zeros(10)
    for rank in range(num_ranks):
        as_rank(rank, num_ranks)
        drawn = sampling(num_draws, generator=generator(rank)).timesteps
        positions = torch.searchsorted(sampling.schedule.timesteps, drawn)
        # 10 / R need not be whole: a position on the border belongs to both neighbours.
        assert positions.min() == rank * 10 // num_ranks
        assert positions.max() == -(-(rank + 1) * 10 // num_ranks) - 1
        counts += torch.bincount(positions, minlength=10)
    expected = num_draws * num_ranks / 10
    # Binomial: five standard deviations are 5 / sqrt(expected), below 6.5 % of at least 6000.
    assert ((counts / expected - 1).abs() < 0.065).all()


@pytest.mark.parametrize("uniform_sampling", [False, True])
def test_one_process_draws_from_the_whole_range(
    make_sampling: Callable[..., DiscreteSampling], uniform_sampling: bool
) -> None:
    timesteps = make_sampling(uniform_sampling=uniform_sampling)(
        20_000, generator=generator()
    ).timesteps
    # 20 draws per level on average: fewer than 1 in 4e8 levels goes without.
    assert len(timesteps.unique()) == 1000
    assert timesteps.min() == 0 and timesteps.max() == 999
    assert timesteps.double().mean().item() == pytest.approx(499.5, abs=8)  # 4 deviations


def test_without_uniform_sampling_ranks_are_not_told_apart(
    make_sampling: Callable[..., DiscreteSampling], as_rank: Callable[[int, int], None]
) -> None:
    as_rank(7, 8)
    assert make_sampling(uniform_sampling=False)(1000, generator=generator()).timesteps.min() < 100


def test_largest_draw_of_the_last_rank_stays_in_the_table(
    make_sampling: Callable[..., DiscreteSampling],
    as_rank: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_rank(7, 8)
    largest = torch.full((2,), 1.0, dtype=torch.float64).nextafter(torch.zeros(2).double())
    monkeypatch.setattr(torch, "rand", lambda *size, **options: largest)
    assert make_sampling()(2).timesteps.tolist() == [999, 999]


def test_levels_belong_to_timesteps(make_sampling: Callable[..., DiscreteSampling]) -> None:
    sampling = make_sampling(num_idx=4)
    drawn = sampling(100, generator=generator())
    table = dict(
        zip(
            sampling.schedule.timesteps.tolist(),
            sampling.schedule.alphas_cumprod_sqrt.tolist(),
            strict=True,
        )
    )
    assert set(drawn.timesteps.tolist()) == {249, 499, 749, 999}
    assert [table[t] for t in drawn.timesteps.tolist()] == drawn.alphas_cumprod_sqrt.tolist()


def test_generator_decides_the_draw(make_sampling: Callable[..., DiscreteSampling]) -> None:
    sampling = make_sampling()
    first, again, other = (
        sampling(50, generator=generator(seed)).timesteps.tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_every_process_of_a_group_counts() -> None:
    from sat import mpu
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():  # by a test that built a transformer; the next one does so again
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
    assert sigma_sampling.data_parallel_rank_and_size() == (0, 1)
    # Rank 5 of 8 in one process; collectives do nothing.
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        assert sigma_sampling.data_parallel_rank_and_size() == (5, 8)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("num_idx", [1, 1001])
def test_impossible_numbers_of_levels_are_refused(
    make_sampling: Callable[..., DiscreteSampling], num_idx: Any
) -> None:
    with pytest.raises(UserError, match=r"num_idx.*from 2 to 1000"):
        make_sampling(num_idx=num_idx)
