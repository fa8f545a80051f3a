"""From video tokens to frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sgm.modules.transformer.final_layer import FinalLayerMixin


def make() -> FinalLayerMixin:
    return FinalLayerMixin(8, 3, patch_size=2, time_embed_dim=6)


def test_channel_is_the_slowest_index_of_a_patch() -> None:
    part = make()
    with torch.no_grad():
        part.linear.bias.copy_(torch.arange(12.0))  # weights are zero: each patch is 0 … 11
        frames = part.final_forward(
            torch.randn(1, 5 + 12, 8),
            time_embedding=torch.randn(1, 6),
            text_length=5,
            grid=(2, 2, 3),
        )
    assert frames.shape == (1, 2, 3, 4, 6)
    patch = torch.arange(12.0).reshape(3, 2, 2)  # (c, p, q)
    torch.testing.assert_close(frames[0, 1], patch.repeat(1, 2, 3), rtol=0, atol=0)


def test_shift_comes_before_scale_and_text_is_dropped() -> None:
    part = make()
    shift, scale = torch.randn(8), torch.randn(8)
    tokens = torch.randn(1, 2 + 1, 8)
    with torch.no_grad():
        part.adaLN_modulation[1].bias.copy_(torch.cat([shift, scale]))
        torch.nn.init.normal_(part.linear.weight)
        frames = part.final_forward(
            tokens, time_embedding=torch.randn(1, 6), text_length=2, grid=(1, 1, 1)
        )
        normed = F.layer_norm(tokens[0, 2], (8,), eps=1e-6)
        expected = part.linear.weight @ (normed * (1 + scale) + shift)
    # Float32 rounding of sums of eight numbers of about 1.
    torch.testing.assert_close(frames.flatten(), expected, rtol=0, atol=1e-5)
