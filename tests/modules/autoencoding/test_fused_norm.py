"""Norm, modulation and SiLU in one go, against float64."""

import pytest
import torch
import torch.nn.functional as F

from sgm.modules.autoencoding import fused_norm
from sgm.modules.autoencoding.fused_norm import norm_silu
from sgm.modules.autoencoding.norms import LatentModulatedNorm, group_norm

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
    monkeypatch.setattr(fused_norm, "CPU_PART", 1)  # statistics are merged from single frames
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
