"""The diffusion transformer against an independent implementation, diffusers' CogVideoX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sgm.models.transformer import DiffusionTransformer
from tests.lora_models import build_theirs

pytest.importorskip("diffusers")


@pytest.mark.parametrize("num_frames", [3, 1])
def test_prediction_equals_diffusers(
    small_config: Callable[..., dict[str, Any]],
    randomize: Callable[[nn.Module], None],
    num_frames: int,
) -> None:
    ours = DiffusionTransformer(**small_config())
    randomize(ours)
    theirs = build_theirs(ours)

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
