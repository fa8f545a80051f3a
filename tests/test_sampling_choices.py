"""What the sampling command sets up of memory, precision and compiling."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from arguments import parse_config
from sgm.config import SamplingArgs
from sgm.errors import UserError
from sgm.loading import compile_network, load_engine

CONFIG = "configs/cogvideox_tiny_infer.yaml"
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "asked", "steps", "able", "compiled"),
    [
        ("cuda", None, 100, True, True),
        ("cuda", None, 99, True, False),
        ("cuda", None, 0, True, False),
        ("cuda", None, 100, False, False),
        ("cuda", False, 1000, True, False),
        ("cuda", True, 1, True, True),
        ("cpu", None, 1000, True, False),
        ("cpu", True, 0, True, True),
    ],
)
def test_what_is_compiled_by_itself(monkeypatch, caplog, device, asked, steps, able, compiled):
    monkeypatch.setattr("sgm.loading.can_compile_kernels", lambda: able)
    caplog.set_level("INFO")
    calls = []
    network = SimpleNamespace(compile_blocks=lambda: calls.append(1))
    model, place = SimpleNamespace(diffusion_model=network), torch.device(device)
    engine = SimpleNamespace(model=model, device=place)
    assert compile_network(engine, asked, num_steps=steps) == compiled
    assert bool(calls) == compiled
    assert ("compiles the transformer" in caplog.text) == compiled


@pytest.mark.parametrize("memory", ["high", "low"])
def test_the_mode_of_memory_reaches_the_engine(monkeypatch, memory):
    monkeypatch.setattr("sgm.loading.choose_memory", lambda *_, **__: memory)
    config = parse_config(SamplingArgs, "", ["--base", CONFIG, "--bf16"])
    config.model["sampler_config"]["params"]["num_steps"] = 2
    engine = load_engine(config, CPU)
    (embedder,) = engine.conditioner.embedders
    weight = engine.model.diffusion_model.time_embed[0].weight
    home = weight.data_ptr()
    away = []
    embedder.transformer.encoder.block[0].register_forward_pre_hook(
        lambda block, _: away.append(next(block.parameters()).dtype)
    )
    engine.model.register_forward_pre_hook(lambda *_: away.append(weight.data_ptr() != home))
    cond = engine.conditioner.encode(["a red circle"])
    generator = torch.Generator().manual_seed(0)
    list(engine.sample_steps(cond, cond, (1, 1, 8, 8, 12), generator=generator))
    assert any(away[1:]) == (memory == "low")
    # On the host they wait in the type of their file, float32, while nothing is embedded.
    waiting = next(embedder.transformer.encoder.block[0].parameters()).dtype
    assert waiting == (torch.float32 if memory == "low" else torch.bfloat16)


@pytest.mark.parametrize(
    "flags", [["--fp8"], ["--compile"], ["--attention", "hopper"], ["--attention", "flash"]]
)
def test_what_the_gpu_cannot_do_is_refused_before_weights_are_read(monkeypatch, flags):
    monkeypatch.setattr("sgm.loading.SATVideoDiffusionEngine", lambda **_: pytest.fail("late"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older GPU")
    monkeypatch.setattr("sgm.toolchain.can_compile_kernels", lambda: False)
    # Attention is asked for on a device that can be had here, which has PyTorch's only.
    device = CPU if "--attention" in flags else torch.device("cuda")
    config = parse_config(SamplingArgs, "", ["--base", CONFIG, *flags])
    with pytest.raises(UserError, match=f"leave {flags[0][2:]} out"):
        load_engine(config, device)


def test_a_mistyped_key_of_the_model_names_its_files():
    config = parse_config(SamplingArgs, "", ["--base", CONFIG])
    config.model["scale_factr"] = config.model.pop("scale_factor")
    with pytest.raises(
        UserError, match=rf"'scale_factr' in configuration {CONFIG}: model; .*'scale_factor'"
    ):
        load_engine(config, CPU)


def test_the_kernel_of_attention_is_the_one_asked_for():
    config = parse_config(SamplingArgs, "", ["--base", CONFIG, "--attention", "sdpa"])
    network = load_engine(config, CPU).model.diffusion_model
    assert network.mixins["adaln_layer"].attention == "sdpa"
