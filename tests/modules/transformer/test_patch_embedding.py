"""From text and clip to tokens."""

from __future__ import annotations

import torch

from sgm.modules.transformer.patch_embedding import ImagePatchEmbeddingMixin


def test_text_comes_first_then_patches_by_frame_row_and_column() -> None:
    # 2 frames of 4 x 6 pixels, patches of 2: each token is to be the sum of its patch.
    part = ImagePatchEmbeddingMixin(3, 1, patch_size=2, text_hidden_size=5)
    x = torch.randn(2, 2, 3, 4, 6)
    context = torch.randn(2, 7, 5)
    with torch.no_grad():
        part.proj.weight.fill_(1)
        part.proj.bias.zero_()
        tokens = part.word_embedding_forward(x, context=context, output_cross_layer={})
        text = part.text_proj(context)
    assert tokens.shape == (2, 7 + 12, 1)
    torch.testing.assert_close(tokens[:, :7], text)
    sums = [
        x[:, frame, :, row : row + 2, column : column + 2].sum(dim=(1, 2, 3))
        for frame in range(2)
        for row in range(0, 4, 2)
        for column in range(0, 6, 2)
    ]
    # Twelve numbers of about 1 are added in another order.
    torch.testing.assert_close(tokens[:, 7:, 0], torch.stack(sums, dim=1), rtol=0, atol=1e-5)
