"""Training in the benchmark: counted operations by hand, and a step of each kind on small sizes."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import pytest

from arguments import parse_config
from sgm.config import Config, TrainingArgs
from sgm.errors import UserError
from tools.bench import diffusers_baseline
from tools.bench.measuring import Workload
from tools.bench.training import (
    build_network,
    deepspeed_settings,
    own_step,
    step_flops,
    training_jobs,
)

CONFIG = Path(__file__).parents[3] / "configs" / "cogvideox_tiny_sft.yaml"
RANK = 2


@pytest.fixture
def config() -> Config:
    """The bundled configuration with two small layers."""
    config = copy.deepcopy(parse_config(TrainingArgs, "", ["--base", str(CONFIG)]))
    config.model["network_config"]["params"] |= {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_frames": 5,
        "latent_height": 4, "latent_width": 4, "time_embed_dim": 16,
    }  # fmt: skip
    return config


def work_of(config: Config, *, attention: str = "auto") -> Workload:
    options = argparse.Namespace(rank=RANK, warmup=1, steps=1, compile=False, attention=attention)
    return Workload(config, options)


def test_operations_of_a_step_by_hand(config: Config) -> None:
    full = build_network(work_of(config), "full", keep="attention")
    lora = build_network(work_of(config), "lora", keep="attention")
    weights = 2 * 12 * 32**2
    lora_weights = 2 * 8 * RANK * 32  # A and B of query, key, value and dense
    attention = 4 * 2 * 32 * 10**2
    assert step_flops(full, num_tokens=10) == 3 * (2 * 10 * weights + attention)
    frozen = 2 * 2 * 10 * weights  # forward, and the gradient of the activations
    assert step_flops(lora, num_tokens=10) == frozen + 3 * (2 * 10 * lora_weights + attention)


@pytest.mark.parametrize("method", ["lora", "full", "diffusers"])
def test_steps_run(config: Config, method: str) -> None:
    if method == "diffusers":
        pytest.importorskip("diffusers")
        pytest.importorskip("peft")
        measured = diffusers_baseline.training_step(work_of(config))
    else:
        measured = own_step(work_of(config), method, keep="attention")
    assert measured.seconds > 0
    assert (measured.flops is None) == (method == "diffusers")


def test_offload_keeps_the_rest_of_the_section(config: Config) -> None:
    config.deepspeed["gradient_clipping"] = 0.5
    settings = deepspeed_settings(config, offload=True)
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert settings["gradient_clipping"] == 0.5
    assert "offload_optimizer" not in config.deepspeed["zero_optimization"]


def test_attention_that_does_not_run_here_is_one_sentence(config: Config) -> None:
    with pytest.raises(UserError, match="attention: flash does not run here"):
        build_network(work_of(config, attention="flash"), "full", keep="all")


def test_a_line_for_each_way_of_training(config: Config) -> None:
    options = argparse.Namespace(
        methods=["lora", "full"], keep=["attention", "all"], compile=True, attention="sdpa",
        against="diffusers",
    )  # fmt: skip
    jobs = training_jobs(config, options)
    labels = [job.label for job in jobs]
    assert labels == [
        "lora, keep attention, compiled, sdpa",
        "lora, keep all, compiled, sdpa",
        "full, keep attention, compiled, sdpa",
        "full, keep all, compiled, sdpa",
        "diffusers, LoRA",
    ]
    assert [job.process for job in jobs] == labels  # none shares a process
    assert [job.is_reference for job in jobs] == [False] * 4 + [True]
