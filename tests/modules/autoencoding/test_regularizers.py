"""Sampling of latents and the KL term, against values worked out by hand."""

import math

import pytest
import torch

from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer

regularizer = DiagonalGaussianRegularizer()


def moments(mean: float, log_variance: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([mean, log_variance], dtype=dtype).reshape(1, 2, 1, 1, 1)


def test_sample_is_mean_plus_deviation_times_noise():
    noise = torch.full((1, 1, 1, 1, 1), 2.0)
    # 3 + sqrt(4) * 2, exact up to the rounding of log and exp
    assert regularizer(moments(3.0, math.log(4.0)), noise=noise).item() == pytest.approx(7.0)


@pytest.mark.parametrize(("log_variance", "clamped"), [(100.0, 20.0), (-100.0, -30.0)])
def test_log_variance_is_clamped(log_variance, clamped):
    noise = torch.ones(1, 1, 1, 1, 1)
    sample = regularizer(moments(0.0, log_variance), noise=noise)
    assert sample.item() == pytest.approx(math.exp(clamped / 2))


def test_same_generator_state_gives_the_same_latents():
    values = torch.zeros(1, 8, 2, 3, 3)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(regularizer(values))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_half_precision_is_computed_in_float32():
    # exp(10) = 22026 times 2 fits float16, but a variance of exp(20) would not.
    noise = torch.full((1, 1, 1, 1, 1), 2.0)
    sample = regularizer(moments(0.0, 20.0, torch.float16), noise=noise)
    assert sample.dtype == torch.float16
    # float16 has 11 bits: 2**15 / 2**11 / 2 = 8 is the largest rounding error here
    assert sample.item() == pytest.approx(2 * math.exp(10.0), abs=16)
    assert regularizer.kl(moments(0.0, 20.0, torch.float16)).isfinite()


def test_kl_of_known_gaussians():
    assert regularizer.kl(moments(0.0, 0.0)).item() == 0.0
    # (mean² + variance - 1 - log variance) / 2 = (9 + 4 - 1 - log 4) / 2
    expected = (12 - math.log(4.0)) / 2
    assert regularizer.kl(moments(3.0, math.log(4.0))).item() == pytest.approx(expected)
