"""The diffusion transformer against an independent implementation, diffusers' CogVideoX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sgm.checkpoint.table import to_diffusers
from sgm.models.transformer import DiffusionTransformer

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("num_frames", [3, 1])
def test_prediction_equals_diffusers(
    small_config: Callable[..., dict[str, Any]],
    randomize: Callable[[nn.Module], None],
    num_frames: int,
) -> None:
    ours = DiffusionTransformer(**small_config())
    randomize(ours)
    theirs = diffusers.CogVideoXTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        time_embed_dim=32,
        text_embed_dim=48,
        max_text_seq_length=10,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        temporal_compression_ratio=4,
        patch_size=2,
        spatial_interpolation_scale=1.875,
        use_rotary_positional_embeddings=False,
    ).eval()
    weights = to_diffusers(ours.state_dict(), "transformer", where="ours")
    theirs.load_state_dict(dict(weights), strict=True)

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, num_frames, 16, 8, 12, generator=generator)
    context = torch.randn(2, 10, 48, generator=generator)
    timesteps = torch.tensor([0, 731])
    with torch.no_grad():
        prediction = ours(x, timesteps=timesteps, context=context)
        expected = theirs(x, context, timesteps).sample
    assert prediction.std() > 0.1
    # Float32 rounding, and the last norm's epsilon: 1e-6 here, 1e-5 there.
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-4)
