"""The choice of the memory mode from the sizes of the model and the free memory."""

import logging
import re

import pytest
import torch

from sgm.config import SamplingArgs
from sgm.engine import SATVideoDiffusionEngine
from sgm.loading import RESERVE, MemoryNeeds, choose_memory, estimate_needs, plan
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.util import build_on_meta, check_params

GIB = 2**30
ARGS = SamplingArgs(latent_channels=4, sampling_num_frames=3, sampling_image_size=[32, 48])


@pytest.mark.parametrize(
    ("free", "mode", "words"),
    [
        (21, "high", "all weights on the GPU need about 20.0 of its 21.0 free GiB"),
        (20, "high", "20.0 free"),
        (19, "low", "need about 20.0 GiB, but only 19.0 GiB are free; .* needs about 5.0 GiB$"),
        (4, "low", "needs about 5.0 GiB, which is also more than is free"),
    ],
)
def test_the_first_mode_that_fits_is_taken_and_says_why(free, mode, words):
    found, reason = plan(MemoryNeeds(high=20 * GIB, low=5 * GIB), free=free * GIB)
    assert found == mode and re.search(words, reason)


def engine_of(model, dtype):
    params = check_params(SATVideoDiffusionEngine, model, where="model")
    return SATVideoDiffusionEngine(**params, device="meta", dtype=dtype)


def needs_of(args, model, dtype):
    return estimate_needs(args, engine_of(model, dtype), dtype=dtype)


def num_weights(part):
    return sum(weight.numel() for weight in part.parameters())


def test_needs_are_weights_and_work(small_model, t5_folder):
    needs = needs_of(ARGS, small_model, torch.float16)
    autoencoder = build_on_meta(small_model["first_stage_config"])
    network = num_weights(build_on_meta(small_model["network_config"]))
    t5 = FrozenT5Embedder(str(t5_folder), 8, dtype=torch.float16).parameters()
    weights = 2 * (network + num_weights(autoencoder)) + sum(weight.nbytes for weight in t5)
    # 9 frames of 32 x 48 pixels with 32 channels are more than 26 tokens of 64.
    frames = 9 * 32 * 48 * 32 * 2
    assert needs.high == RESERVE + weights + 9 * frames
    assert needs.low == RESERVE + 2 * num_weights(autoencoder.decoder) + 6 * frames


def test_in_a_large_network_sampling_decides(small_model):
    small_model["network_config"]["params"]["num_layers"] = 70
    needs = needs_of(ARGS, small_model, torch.bfloat16)
    network = num_weights(build_on_meta(small_model["network_config"]))
    tokens = 2 * (8 + 3 * 2 * 3) * 64 * 2  # two branches, text and video, width 64, 2 bytes
    assert needs.low == RESERVE + 2 * network + 16 * tokens


def test_tiles_need_less_where_the_frame_is_larger_than_one(small_model):
    args = ARGS.model_copy(update={"sampling_image_size": [480, 720]})
    whole, small = (needs_of(a, small_model, torch.float16) for a in (args, ARGS))
    args, tiny = (a.model_copy(update={"tile_decode": True}) for a in (args, ARGS))
    assert needs_of(args, small_model, torch.float16).low < whole.low
    assert needs_of(tiny, small_model, torch.float16) == small


def chosen(memory, model, device):
    args = ARGS.model_copy(update={"memory": memory})
    engine = engine_of(model, torch.float16)
    return choose_memory(args, engine, device=torch.device(device), dtype=torch.float16)


@pytest.mark.parametrize(("too_little", "mode"), [(0, "high"), (1, "low")])
def test_automatic_looks_at_what_is_free_and_logs_one_line(
    small_model, monkeypatch, caplog, too_little, mode
):
    caplog.set_level(logging.INFO)
    needs = needs_of(ARGS, small_model, torch.float16)
    free = needs.high - too_little
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * GIB))
    caplog.clear()
    assert chosen("auto", small_model, "cuda:0") == mode
    (message,) = caplog.messages
    assert message.startswith(f"memory: {mode}, because all weights on the GPU need about")


def test_a_mode_that_is_asked_for_is_taken_on_a_gpu(small_model, caplog):
    caplog.set_level(logging.INFO)
    assert [chosen(mode, small_model, "cuda:0") for mode in ("high", "low")] == ["high", "low"]
    assert caplog.messages == [
        "memory: high, as set by the option memory",
        "memory: low, as set by the option memory",
    ]


def test_on_a_cpu_it_is_always_high_and_says_so_if_low_was_asked_for(small_model, caplog):
    caplog.set_level(logging.INFO)
    assert {chosen(mode, small_model, "cpu") for mode in ("auto", "high", "low")} == {"high"}
    (message,) = caplog.messages
    assert message.startswith("using memory: high, because a CPU")
