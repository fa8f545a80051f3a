"""Norms: the modulation by latents, and with SiLU in one go, plain and as Triton kernels."""

import pytest
import torch
import torch.nn.functional as F

from sgm.modules.autoencoding import norms
from sgm.modules.autoencoding.norms import LatentModulatedNorm, group_norm, norm_silu

# Batch, channels and size of a feature map, and the size of the latents: odd sizes, one frame,
# first frame apart or not, channels that are no power of two, and the encoder's norm without any.
CASES = [
    (1, 96, (5, 6, 10), (3, 3, 5)),
    (3, 64, (9, 5, 6), (3, 5, 1)),
    (1, 32, (1, 7, 5), (1, 7, 5)),
    (3, 32, (4, 6, 6), (2, 3, 2)),
    (3, 96, (3, 9, 7), None),
    (1, 64, (1, 5, 5), None),
]


def build(batch, channels, size, latent_size, dtype):
    """A norm, its input with a mean far from zero, and latents."""
    torch.manual_seed(0)
    x = (torch.randn(batch, channels, *size) * 3 + 5).to(dtype)
    if latent_size is None:
        return group_norm(channels).to(dtype).requires_grad_(False), x, None
    norm = LatentModulatedNorm(channels, latent_channels=4).to(dtype).requires_grad_(False)
    return norm, x, torch.randn(batch, 4, *latent_size).to(dtype)


def in_float64(norm, x, latents):
    """SiLU(norm(x)), with the modulation rounded as the convolutions of the dtype round it."""
    layer = norm if latents is None else norm.norm_layer
    normed = F.group_norm(x.double(), 32, layer.weight.double(), layer.bias.double(), eps=1e-6)
    if latents is not None:
        scale, shift = norm.conv_y(latents).double(), norm.conv_b(latents).double()
        frames, rows, columns = (
            n // m for n, m in zip(x.shape[2:], latents.shape[2:], strict=True)
        )
        first = x.shape[2] % 2
        if latents.shape[2] > 1:
            frames = (x.shape[2] - first) // (latents.shape[2] - first)
        places = [(t + first * (frames - 1)) // frames for t in range(x.shape[2])]
        for dim, repeats in ((3, rows), (4, columns)):
            scale, shift = (part.repeat_interleave(repeats, dim) for part in (scale, shift))
        normed = normed * scale[:, :, places] + shift[:, :, places]
    return F.silu(normed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64_within_two_units_in_the_last_place(case, dtype, monkeypatch):
    monkeypatch.setattr(norms, "CPU_PART", 1)  # statistics are merged from single frames
    norm, x, latents = build(*case, dtype)
    expected = in_float64(norm, x, latents)
    actual = norm_silu(norm, x, latents)
    assert actual.dtype == dtype
    # Units of the terms of a sum, since those of the sum vanish where they cancel: about 8 here.
    unit = torch.finfo(dtype).eps * expected.abs().clamp(min=8 if dtype == torch.float32 else 1e-2)
    assert ((actual.double() - expected).abs() <= 2 * unit).all()


def test_room_in_front_and_results_in_place():
    norm, x, latents = build(*CASES[0], torch.float32)
    expected = norm_silu(norm, x, latents)
    roomy = norm_silu(norm, x, latents, room=2)
    assert roomy.shape[2] == x.shape[2] + 2
    assert torch.equal(roomy[:, :, 2:], expected)
    assert norm_silu(norm, x, latents, into=x) is x
    assert torch.equal(x, expected)


def test_with_gradients_the_value_is_the_same():
    norm, x, latents = build(*CASES[0], torch.float32)
    expected = norm_silu(norm, x, latents, room=1)[:, :, 1:]
    norm.requires_grad_(True)
    actual = norm_silu(norm, x, latents, room=1)[:, :, 1:]
    # The two orders differ by float32 rounding of values of a few units.
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    actual.sum().backward()
    assert all(weight.grad is not None for weight in norm.parameters())


@pytest.mark.parametrize(("latent_frames", "num_frames"), [(3, 9), (3, 5), (2, 8), (1, 1), (2, 2)])
def test_modulation_matches_latents_stretched_first(latent_frames, num_frames):
    torch.manual_seed(0)
    norm = LatentModulatedNorm(32, latent_channels=4)
    x = torch.randn(2, 32, num_frames, 6, 8) + 1.0
    z = torch.randn(2, 4, latent_frames, 3, 2)
    size = (num_frames, 6, 8)
    if num_frames > 1 and num_frames % 2:
        first = F.interpolate(z[:, :, :1], size=(1, 6, 8))
        rest = F.interpolate(z[:, :, 1:], size=(num_frames - 1, 6, 8))
        stretched = torch.cat([first, rest], dim=2)
    else:
        stretched = F.interpolate(z, size=size)
    normed = F.group_norm(x, 32, norm.norm_layer.weight, norm.norm_layer.bias, eps=1e-6)
    expected = normed * norm.conv_y(stretched) + norm.conv_b(stretched)
    # The two orders differ by float32 rounding of values of a few units.
    torch.testing.assert_close(norm(x, z), expected, atol=5e-6, rtol=0)


INTERPRETED = """
import torch
from sgm.modules.autoencoding import blocks, norms, triton_norm
from sgm.modules.autoencoding.norms import group_norm
from tests.modules.autoencoding.test_norms import CASES, build

triton_norm.MAX_PROGRAMS = 2  # so that a program adds up several tiles, the last not full
triton_norm.TILE_ELEMENTS = 1024

def use(kernels):
    blocks.fused_kernels = norms.fused_kernels = lambda x: kernels

def close(actual, expected, units):
    unit = torch.finfo(expected.dtype).eps * expected.double().abs().clamp(min=1e-2)
    return bool(((actual.double() - expected.double()).abs() <= units * unit).all())

for case, dtype in zip(CASES, [torch.float16, torch.bfloat16] * 3, strict=True):
    norm, x, latents = build(*case, dtype)
    offset = torch.randn(x.shape[1]).to(dtype)
    use(None)
    plain = norms.norm_silu(norm, x, latents)
    shifted = x.float() + offset[:, None, None, None]
    latents32 = None if latents is None else latents.float()
    expected = norms.norm_silu(norm.float(), shifted, latents32)
    use(triton_norm)
    norm.to(dtype)
    fused = norms.norm_silu(norm, x, latents, room=2)[:, :, 2:]
    assert close(fused, plain, 2), (dtype, case)
    fused = norms.norm_silu(norm, x, latents, offset=offset)
    # The modulation is rounded by its convolutions, in other places than in float32.
    assert latents is not None or close(fused, expected.to(dtype), 2), (dtype, case)
    error = (fused.double() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps, (dtype, case)

# In place, where channels are last
own = torch.empty_like(fused, memory_format=torch.channels_last_3d).copy_(x)
norms.norm_silu(norm, own, latents, into=own, offset=offset)
assert torch.equal(own, fused)

into, x = (torch.randn(2, 96, 3, 5, 7).half().contiguous(memory_format=torch.channels_last_3d)
           for _ in range(2))
bias = torch.randn(96)
expected = into.double() + x + bias[:, None, None, None]
triton_norm.add_with_bias(into, x, bias=bias)
assert close(into, expected.half(), 1)

for channels in (32, 64):  # with a shortcut that is a convolution, and without
    block = blocks.CausalResnetBlock(64, channels, dropout=0.0, make_norm=group_norm)
    block.half().requires_grad_(False)
    for limit in (2**30, 64 * 35 * 2):  # whole, and long inputs two frames at a time
        blocks.frames_per_call = lambda x, channels: limit // (64 * 35)
        x = torch.randn(1, 64, 5, 7, 5).half().contiguous(memory_format=torch.channels_last_3d)
        use(None)
        expected = block(x).double()
        use(triton_norm)
        assert (block(x) - expected).abs().max() < 4e-3 * expected.abs().max(), (channels, limit)
print("agrees")
"""


def test_triton_kernels_agree_with_the_plain_path_when_interpreted(run_interpreted):
    pytest.importorskip("triton")
    result = run_interpreted(INTERPRETED)
    assert result.stdout == "agrees\n", result.stderr
