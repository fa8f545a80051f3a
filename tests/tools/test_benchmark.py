"""Counted operations by hand, and a training step of each kind on small sizes."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import pytest
import torch

from arguments import Config, TrainingArgs, parse_config
from sgm.errors import UserError
from tools.benchmark import (
    Result,
    Variant,
    build_network,
    build_parser,
    deepspeed_settings,
    forward_flops,
    main,
    measure,
    print_table,
    run_variant,
    step_flops,
)

CONFIG = Path(__file__).parents[2] / "configs" / "cogvideox_tiny_sft.yaml"
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


def test_operations_of_the_2b_model_by_hand() -> None:
    # 30 layers of 12 · 1920² weights, 226 + 13 · 30 · 45 tokens: 47.2 + 72.8 TFLOP
    flops = forward_flops(30 * 12 * 1920**2, num_tokens=17776, num_layers=30, width=1920)
    assert flops == pytest.approx(119.98e12, rel=1e-4)


def test_operations_of_a_step_by_hand(config: Config) -> None:
    cpu = torch.device("cpu")
    full = build_network(config, Variant("full", compiled=False), rank=RANK, device=cpu)
    lora = build_network(config, Variant("lora", compiled=False), rank=RANK, device=cpu)
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
    options = argparse.Namespace(rank=RANK, warmup=1, steps=1)
    result = run_variant(config, Variant(method, compiled=False), options)
    assert result.device == "cpu"
    assert result.seconds > 0
    assert (result.model_flops is None) == (method == "diffusers")


def test_offload_keeps_the_rest_of_the_section(config: Config) -> None:
    config.deepspeed["gradient_clipping"] = 0.5
    settings = deepspeed_settings(config, offload=True)
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert settings["gradient_clipping"] == 0.5
    assert "offload_optimizer" not in config.deepspeed["zero_optimization"]


def test_median_leaves_the_warmup_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 100, 100, 101, 101, 103, 103, 109])  # steps of 100, then 1, 2 and 6 s
    monkeypatch.setattr("tools.benchmark.time.perf_counter", lambda: next(clock))
    inputs = (torch.zeros(1), torch.zeros(1))
    assert measure(lambda *_: None, inputs, warmup=1, steps=3) == (2, 0)


def test_table_compares_with_the_rival(capsys: pytest.CaptureFixture[str]) -> None:
    own = Result("lora", "cpu", 0.5, 2.0, 3 * 10**9, 1e12, 0.25)
    rival = Result("diffusers, LoRA", "cpu", 1.0, 1.0, 0, None, None)
    print_table([own, rival])
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["lora", "0.500", "2.000", "3.00", "25.0%", "0.50x"]
    assert second.split()[-2:] == ["-", "1.00x"]


def test_numbers_below_one_are_refused() -> None:
    assert build_parser().parse_args(["--base", "x.yaml"]).only == "train"
    with pytest.raises(UserError, match="--steps, --warmup and --rank must be at least 1"):
        main(["--base", str(CONFIG), "--steps", "0"])
