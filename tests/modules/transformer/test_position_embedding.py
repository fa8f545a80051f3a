"""The position table against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sgm.errors import UserError
from sgm.modules.transformer.position_embedding import Basic3DPositionEmbeddingMixin, sine_cosine

FLOAT32_ROUNDING = 1e-6  # values are at most 1 and were rounded once


def make(hidden_size: int = 16, **changes: float) -> Basic3DPositionEmbeddingMixin:
    """A table of 2 frames of 2 x 3 patches after 4 text tokens."""
    return Basic3DPositionEmbeddingMixin(
        2, (2, 3), hidden_size=hidden_size, text_length=4, **changes
    )


def test_sine_cosine_by_hand() -> None:
    # width 4: frequencies 1 and 1/10000^(2/4) = 1/100
    expected = [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]
    found = sine_cosine(torch.tensor([3.0]), 4)
    torch.testing.assert_close(found, torch.tensor([expected]).double(), rtol=0, atol=1e-6)


def test_each_token_holds_its_frame_column_and_row() -> None:
    table = make(height_interpolation=2.0, width_interpolation=4.0).pos_embedding
    assert table.shape == (1, 4 + 12, 16)
    assert not table[:, :4].any()  # text
    for frame in range(2):
        for row in range(2):
            for column in range(3):
                token = table[0, 4 + (frame * 2 + row) * 3 + column]
                positions = torch.tensor([frame, column / 4.0, row / 2.0]).split(1)
                parts = [sine_cosine(p, w)[0] for p, w in zip(positions, (4, 6, 6), strict=True)]
                expected = torch.cat(parts).float()
                torch.testing.assert_close(token, expected, rtol=0, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("num_frames", [1, 2])
def test_clip_uses_the_first_frames(num_frames: int) -> None:
    part = make()
    positions = part.position_embedding_forward(None, grid=(num_frames, 2, 3))
    torch.testing.assert_close(positions, part.pos_embedding[:, : 4 + num_frames * 6])


def test_table_is_not_trained() -> None:
    assert not make().pos_embedding.requires_grad


def test_computed_on_the_device_asked_for() -> None:
    with torch.device("meta"):
        part = make()
        table = part.compute_table(device="cpu", dtype=torch.bfloat16)
    assert part.pos_embedding.is_meta
    assert (table.device.type, table.dtype) == ("cpu", torch.bfloat16)
    torch.testing.assert_close(table, make().pos_embedding.data.bfloat16(), rtol=0, atol=0)


def test_impossible_values() -> None:
    with pytest.raises(UserError, match="hidden_size=24.*multiple of 16"):
        make(hidden_size=24)
    with pytest.raises(UserError, match="width_interpolation=0"):
        make(width_interpolation=0)
