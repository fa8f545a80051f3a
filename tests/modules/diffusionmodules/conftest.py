"""Fixtures of the tests of samplers, guiders and loss: config nodes and the goldens' network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.util import instantiate_from_config

PREFIX = "sgm.modules.diffusionmodules"
GOLDENS = Path(__file__).parents[2] / "goldens"


def node(path: str, **params: Any) -> dict[str, Any]:
    """A configuration node of this package."""
    return {"target": f"{PREFIX}.{path}", "params": params}


def discretization_node() -> dict[str, Any]:
    """The 2B model's noise levels."""
    return node("discretizer.ZeroSNRDDPMDiscretization", shift_scale=3.0)


def sampler_node(sampler: str, num_steps: int, guider: dict[str, Any]) -> dict[str, Any]:
    """A sampler node as in published files, with `verbose`."""
    return node(
        f"sampling.{sampler}",
        num_steps=num_steps,
        verbose=True,
        discretization_config=discretization_node(),
        guider_config=guider,
    )


@pytest.fixture
def make_node() -> Callable[..., dict[str, Any]]:
    return node


@pytest.fixture
def make_sampler() -> Callable[..., Any]:
    def make(sampler: str, num_steps: int, guider: dict[str, Any]) -> Any:
        return instantiate_from_config(sampler_node(sampler, num_steps, guider))

    return make


@pytest.fixture
def sample() -> Callable[..., Tensor]:
    """Runs all steps of a sampler; returns the latents after the last one."""

    def run(sampler: Any, *inputs: Any, **named_inputs: Any) -> Tensor:
        *_, last = sampler.steps(*inputs, **named_inputs)
        return last.x

    return run


@pytest.fixture
def denoiser() -> DiscreteDenoiser:
    """The denoiser of the 2B configuration."""
    return instantiate_from_config(
        node(
            "denoiser.DiscreteDenoiser",
            num_idx=1000,
            quantize_c_noise=False,
            weighting_config=node("denoiser_weighting.EpsWeighting"),
            scaling_config=node("denoiser_scaling.VideoScaling"),
            discretization_config=discretization_node(),
        )
    )


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    return lambda name: load_file(GOLDENS / f"{name}.safetensors")


class RecordingNetwork:
    """The goldens' network, tanh(x) cos(t / 100) + mean of the text; records its inputs."""

    def __init__(self) -> None:
        self.timesteps: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.conditionings: list[dict[str, Tensor]] = []

    def __call__(self, x: Tensor, timesteps: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.inputs.append(x)
        self.timesteps.append(timesteps)
        self.conditionings.append(cond)
        wave = torch.cos(timesteps.float() / 100).reshape(-1, 1, 1, 1, 1)
        of_text = cond["crossattn"].mean(dim=(1, 2)).reshape(-1, len(x), 1, 1, 1, 1)
        return (torch.tanh(x) * wave + of_text).flatten(0, 1)


@pytest.fixture
def network() -> RecordingNetwork:
    return RecordingNetwork()
