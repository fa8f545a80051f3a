"""The video autoencoder against recorded results, and the properties of its design."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.autoencoding import convolve, norms
from sgm.util import instantiate_from_config

TESTS = Path(__file__).parents[1]
WIDTHS_2B = {"ch": 128, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 3, "z_channels": 16}
WIDTHS_GOLDEN = {"ch": 32, "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1, "z_channels": 4}
WIDTHS_TINY = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}

# One pass in float32, on values up to 13: a right implementation differs by rounding, 1e-6 to 1e-5.
SINGLE_PASS = 2e-5


def node(widths: dict, **params: object) -> dict:
    """A first_stage_config as published YAML files write it, with the old names."""
    unread = {"double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
    nets = {**unread, **widths, "attn_resolutions": [], "gather_norm": True}
    return {
        "target": "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper",
        "params": {
            "cp_size": 1,
            "ignore_keys": ["loss"],
            "loss_config": {"target": "torch.nn.Identity"},
            "regularizer_config": {
                "target": "vae_modules.regularizers.DiagonalGaussianRegularizer"
            },
            "encoder_config": {
                "target": "vae_modules.cp_enc_dec.ContextParallelEncoder3D",
                "params": nets,
            },
            "decoder_config": {
                "target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D",
                "params": nets,
            },
            **params,
        },
    }


def tiny_vae() -> VideoAutoencoderInferenceWrapper:
    torch.manual_seed(0)
    return instantiate_from_config(node(WIDTHS_TINY)).eval()


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(TESTS / "goldens" / "vae_small.safetensors")


@pytest.fixture(scope="module")
def golden_vae(golden) -> VideoAutoencoderInferenceWrapper:
    vae = instantiate_from_config(node(WIDTHS_GOLDEN)).eval().requires_grad_(False)
    weights = {
        name.removeprefix("weight."): value.float()
        for name, value in golden.items()
        if name.startswith("weight.")
    }
    vae.load_state_dict(weights)
    return vae


def assert_agrees(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=SINGLE_PASS, rtol=0)


@pytest.mark.parametrize("suffix", ["", "_image"])
def test_golden_moments(golden, golden_vae, suffix):
    moments, log = golden_vae.encode(golden[f"in.x{suffix}"], unregularized=True)
    assert log == {}
    assert_agrees(moments, golden[f"out.moments{suffix}"])


def test_golden_latents(golden, golden_vae):
    latents = golden_vae.encode(golden["in.x"], noise=golden["in.noise"])
    assert_agrees(latents, golden["out.latents"])


def test_golden_streamed_decode_also_the_second_time(golden, golden_vae):
    expected = golden["out.decoded_streamed"]
    first = golden_vae.decode(golden["in.z"])
    golden_vae.decode(golden["in.z"][:, :, :3].flip(2))  # another video in between
    second = golden_vae.decode(golden["in.z"])
    assert_agrees(first, expected)
    assert torch.equal(second, first)


def test_golden_one_frame_decode(golden, golden_vae):
    golden_vae.decode(golden["in.z"])
    assert_agrees(golden_vae.decode(golden["in.z_image"]), golden["out.decoded_image"])


def test_golden_one_pass_decode_is_the_decoder_without_a_cache(golden, golden_vae):
    one_pass = golden_vae.decoder(golden["in.z"])
    assert_agrees(one_pass, golden["out.decoded_oneshot"])
    # The norms use the statistics of a chunk, so streaming differs by more than rounding.
    assert (one_pass - golden["out.decoded_streamed"]).abs().max() > 1.0


@pytest.mark.parametrize("limit", [1, 3 * 16 * 16 * 32])  # one frame at a time; a few
def test_goldens_of_videos_too_long_for_one_call(golden, golden_vae, limit, monkeypatch):
    monkeypatch.setattr(convolve, "MAX_ELEMENTS_PER_CALL", limit)
    moments, _ = golden_vae.encode(golden["in.x"], unregularized=True)
    assert_agrees(moments, golden["out.moments"])
    assert_agrees(golden_vae.decode(golden["in.z"]), golden["out.decoded_streamed"])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that were created in this mode; `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@torch.no_grad()
def test_a_long_clip_is_encoded_beside_two_of_its_largest_feature_maps(monkeypatch):
    vae, x = tiny_vae(), torch.rand(1, 3, 33, 32, 48) * 2 - 1
    frame = 32 * 32 * 48  # elements of the first level
    monkeypatch.setattr(norms, "CPU_PART", frame)
    monkeypatch.setattr(convolve, "CPU_ELEMENTS", frame)
    with LiveBytes() as whole:
        expected, _ = vae.encode(x, unregularized=True)
    monkeypatch.setattr(convolve, "MAX_ELEMENTS_PER_CALL", 20 * frame)
    monkeypatch.setattr(convolve, "ELEMENTS_PER_PART", frame)
    with LiveBytes() as bounded:
        actual, _ = vae.encode(x, unregularized=True)
    assert_agrees(actual, expected)
    # Two maps of 33 + 2 frames, and ten frames: the frames that a step computes, and a copy of its
    # input frames on a CPU.
    assert bounded.peak < (2 * 35 + 10) * frame * 4 < 0.8 * whole.peak


def test_names_and_shapes_of_the_2b_autoencoder():
    expected = json.loads((TESTS / "data" / "vae_keys.json").read_text())
    with torch.device("meta"):
        vae = instantiate_from_config(node(WIDTHS_2B))
    assert {name: list(value.shape) for name, value in vae.state_dict().items()} == expected
    assert all(value.is_meta for value in vae.state_dict().values())


@torch.no_grad()
def test_streamed_chunks_are_the_decode_and_their_sizes_are_known():
    vae, z = tiny_vae(), torch.randn(1, 4, 7, 2, 2)
    chunks = list(vae.decode_streamed(z))
    assert [chunk.shape[2] for chunk in chunks] == [9, 8, 8]
    assert torch.equal(torch.cat(chunks, dim=2), vae.decode(z))


@torch.no_grad()
def test_decoded_frames_do_not_depend_on_later_chunks():
    vae, z = tiny_vae(), torch.randn(1, 4, 7, 2, 2)
    changed = z.clone()
    changed[:, :, 5:] += 1.0
    difference = (vae.decode(z) - vae.decode(changed)).abs().amax(dim=(0, 1, 3, 4))
    assert torch.equal(difference[:17], torch.zeros(17))
    assert (difference[17:] > 0).all()


@torch.no_grad()
def test_later_chunks_depend_on_earlier_ones_through_the_cache():
    vae, z = tiny_vae(), torch.randn(1, 4, 5, 2, 2)
    changed = z.clone()
    changed[:, :, :3] += 1.0
    assert (vae.decode(z)[:, :, 9:] - vae.decode(changed)[:, :, 9:]).abs().max() > 1e-3


@torch.no_grad()
def test_an_abandoned_decode_leaves_nothing_behind():
    vae, z = tiny_vae(), torch.randn(1, 4, 3, 2, 2)
    expected = vae.decode(z)
    started = vae.decode_streamed(torch.randn(1, 4, 5, 2, 2))
    next(started)
    assert torch.equal(vae.decode(z), expected)
    # Two decodes may also take turns: each has its own frames.
    other = torch.randn(1, 4, 5, 2, 2)
    pairs = list(zip(vae.decode_streamed(other), vae.decode_streamed(other), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)


@torch.no_grad()
def test_the_first_frame_is_encoded_without_the_later_ones_but_for_the_norms(monkeypatch):
    vae = tiny_vae()

    # Without the statistics of their input, norms do not mix frames.
    def mean_0_variance_1(counts, means, squares, *, num_groups):
        return torch.zeros_like(means[0]), torch.ones_like(means[0])

    monkeypatch.setattr(norms, "_merge", mean_0_variance_1)
    x = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    changed = x.clone()
    changed[:, :, 5:] = 0.5
    first, second = (vae.encode(video, unregularized=True)[0] for video in (x, changed))
    assert torch.equal(first[:, :, :2], second[:, :, :2])
    assert not torch.equal(first[:, :, 2], second[:, :, 2])


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 9, 17])
def test_shapes_there_and_back(frames):
    vae = tiny_vae()
    latents = vae.encode(torch.zeros(2, 3, frames, 16, 24))
    assert latents.shape == (2, 4, (frames - 1) // 4 + 1, 2, 3)
    assert vae.decode(latents).shape == (2, 3, frames, 16, 24)


@torch.no_grad()
def test_a_batch_is_its_samples():
    vae, z = tiny_vae(), torch.randn(2, 4, 5, 2, 2)
    alone = torch.cat([vae.decode(z[:1]), vae.decode(z[1:])])
    # Other blocking of the same sums: float32 rounding of values of a few units.
    torch.testing.assert_close(vae.decode(z), alone, atol=SINGLE_PASS, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_take_float32_input(dtype):
    vae = tiny_vae()
    x, z = torch.rand(1, 3, 5, 16, 16) * 2 - 1, torch.randn(1, 4, 3, 2, 2)
    expected_moments, expected_video = vae.encode(x, unregularized=True)[0], vae.decode(z)
    vae.to(dtype)
    moments, video = vae.encode(x, unregularized=True)[0], vae.decode(z)
    assert moments.dtype == video.dtype == dtype
    # About twenty layers; each has a rounding error of half a unit in the last of 11 or 8 bits.
    tolerance = 20 * torch.finfo(dtype).eps
    for half, full in ((moments, expected_moments), (video, expected_video)):
        assert (half.float() - full).abs().mean() < tolerance * full.abs().mean()


@pytest.mark.parametrize("count", [2, 4, 12])
def test_an_even_number_of_latent_frames_is_refused(count):
    with pytest.raises(ValueError, match=rf"an odd t, not \(1, 4, {count}, 2, 2\)"):
        tiny_vae().decode_streamed(torch.zeros(1, 4, count, 2, 2))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 16, 16), r"4k\+1, h, w\) .*, not \(1, 3, 8, 16, 16\)"),
        ((1, 3, 5, 16, 20), r"divisible by 8, not \(1, 3, 5, 16, 20\)"),
        ((1, 5, 3, 16, 16), r"shape \(b, 3, 4k\+1, h, w\) .*, not \(1, 5, 3, 16, 16\)"),
        ((3, 5, 16, 16), r"shape \(b, 3, 4k\+1, h, w\)"),
    ],
)
def test_videos_of_other_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_vae().encode(torch.zeros(shape))


def test_latents_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(b, 4, t, h, w\) .*, not \(1, 3, 4, 2, 2\)"):
        tiny_vae().decode(torch.zeros(1, 3, 4, 2, 2))
