"""Gradients of the loss against those through diffusers' transformer with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgm.checkpoint.table import to_diffusers
from sgm.engine import NetworkWrapper
from sgm.models.transformer import DiffusionTransformer
from sgm.util import instantiate_from_config
from tests.lora_models import build_theirs

pytest.importorskip("diffusers")

MODULES = "sgm.modules.diffusionmodules"
TABLE = {
    "target": f"{MODULES}.discretizer.ZeroSNRDDPMDiscretization",
    "params": {"shift_scale": 3.0},
}
DENOISER = {
    "target": f"{MODULES}.denoiser.DiscreteDenoiser",
    "params": {
        "num_idx": 1000,
        "weighting_config": {"target": f"{MODULES}.denoiser_weighting.EpsWeighting"},
        "scaling_config": {"target": f"{MODULES}.denoiser_scaling.VideoScaling"},
        "discretization_config": TABLE,
    },
}
SAMPLING = {
    "target": f"{MODULES}.sigma_sampling.DiscreteSampling",
    "params": {"num_idx": 1000, "discretization_config": TABLE},
}


@pytest.fixture
def networks(small_config, randomize) -> tuple[nn.Module, nn.Module]:
    ours = DiffusionTransformer(**small_config())
    randomize(ours)
    return ours, build_theirs(ours)


def gradients(
    predict: Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor], module: nn.Module
) -> dict[str, Tensor]:
    params = {"sigma_sampler_config": SAMPLING}
    loss_fn = instantiate_from_config(
        {"target": f"{MODULES}.loss.VideoDiffusionLoss", "params": params}
    )
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 16, 8, 12, generator=generator)
    cond = {"crossattn": torch.randn(2, 10, 48, generator=generator)}
    denoiser = instantiate_from_config(DENOISER)
    loss_fn(predict, denoiser, x, cond, generator=generator).mean().backward()
    return {name: w.grad for name, w in module.named_parameters() if w.grad is not None}


def test_gradients_equal_those_through_diffusers(networks):
    ours, theirs = networks
    found = to_diffusers(gradients(NetworkWrapper(ours), ours), "transformer", where="ours")
    expected = gradients(
        lambda x, timesteps, cond: theirs(x, cond["crossattn"], timesteps).sample, theirs
    )
    assert found.keys() == expected.keys() and len(found) > 50
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        # Float32 rounding, relative to a weight's largest gradient: 2e-5 here. The bias of the norm
        # of the keys changes no prediction, so its gradient is nothing but rounding.
        bound = max(1e-4 * float(gradient.abs().max()), 1e-6 * largest)
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=bound, msg=name)
