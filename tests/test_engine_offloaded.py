"""An engine whose weights wait on the host makes the same videos as any other."""

import pytest
import torch

from sgm.engine import SATVideoDiffusionEngine
from sgm.modules.autoencoding.causal_conv import HostConvCache
from sgm.util import check_params

SHAPE = (1, 5, 4, 4, 6)


@pytest.fixture
def build(small_model):
    """Makes engines with the same random weights."""
    small_model["network_config"]["params"]["modules"].pop("lora_config", None)
    small_model["network_config"]["params"]["num_frames"] = 17  # two chunks

    def make(stream_text=False, device="cpu", **changes):
        params = check_params(SATVideoDiffusionEngine, small_model | changes, where="model")
        engine = SATVideoDiffusionEngine(**params, device="meta").eval()
        engine.load_weights(device, stream_text=stream_text)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for part in (engine.model, engine.first_stage_model):
                for weight in part.parameters():
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        return engine

    return make


def video_of(engine, callback=lambda step: None):
    """Latents and frames of a prompt."""
    cond = engine.conditioner.encode(["a red circle"])
    uncond = engine.conditioner.unconditional(cond)
    generator = torch.Generator().manual_seed(1)
    for step in engine.sample_steps(cond, uncond, SHAPE, generator=generator):
        callback(step)
    latents = step.x
    return latents, torch.cat(list(engine.decode_first_stage(latents)), dim=1)


def places(part):
    return [weight.data_ptr() for weight in part.parameters()]


def test_the_video_is_the_same_to_the_last_bit(build, monkeypatch):
    resident, low = build(), build(stream_text=True)
    low.offload()
    (embedder,) = low.conditioner.embedders
    assert embedder.transformer.dtype == torch.float16  # the file's, while nothing is embedded
    latents, frames = video_of(resident)
    assert frames.shape == (1, 17, 3, 32, 48) and frames.std() > 0
    filled = []
    fill = HostConvCache.fill
    monkeypatch.setattr(
        HostConvCache,
        "fill",
        lambda *a: (filled.append(a), fill(*a)),  # between two chunks
    )
    for _ in range(2):  # the first video leaves all as it was
        of_low = video_of(low)
        assert torch.equal(of_low[0], latents) and torch.equal(of_low[1], frames)
    assert filled


def test_network_and_decoder_are_away_only_while_they_work(build):
    engine = build()
    engine.offload()
    network, decoder = engine.model, engine.first_stage_model.decoder
    homes = places(network), places(decoder)
    seen = []

    def look(*_):
        seen.append((places(network) == homes[0], places(decoder) == homes[1]))

    network.register_forward_pre_hook(look)
    decoder.register_forward_pre_hook(look)
    video_of(engine)
    assert seen == [(False, True)] * 2 + [(True, False)] * 2  # two steps, two chunks
    assert (places(network), places(decoder)) == homes


def test_what_is_interrupted_leaves_no_weights_behind(build):
    engine = build()
    engine.offload()
    homes = places(engine)
    latents, _ = video_of(engine)
    chunks = engine.decode_first_stage(latents)
    next(chunks)
    assert places(engine) != homes
    del chunks  # as where a frame cannot be written
    assert places(engine) == homes

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video_of(engine, callback=fail)
    assert places(engine) == homes


def test_two_decodings_at_a_time_are_refused(build):
    engine = build()
    engine.offload()
    latents = torch.randn(1, 7, *SHAPE[2:])  # of three chunks
    first, second = (engine.decode_first_stage(latents) for _ in range(2))
    next(first)
    with pytest.raises(RuntimeError, match="on their device already"):
        next(second)
    next(first)  # still has its weights


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_video_is_the_same_to_the_last_bit(build):
    half = {"dtype": torch.float16, "device": "cuda"}
    resident, low = build(**half), build(stream_text=True, **half)
    low.offload()
    latents, frames = video_of(resident)
    for _ in range(2):
        of_low = video_of(low)
        assert torch.equal(of_low[0], latents) and torch.equal(of_low[1], frames)
