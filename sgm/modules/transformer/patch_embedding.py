"""Embedding of text and latent clip as one sequence of tokens."""

from __future__ import annotations

import torch
from einops import rearrange
from sat.model.base_model import BaseMixin
from torch import Tensor, nn

from sgm.distributed import SequenceShard


class ImagePatchEmbeddingMixin(BaseMixin):
    """Embeds text tokens and the square patches of each frame, all in the model's width.

    Args:
        in_channels: latent channels c.
        hidden_size: width d of a token.
        patch_size: height and width of a patch, in latent pixels.
        text_hidden_size: width of the text embedding.
    """

    def __init__(
        self, in_channels: int, hidden_size: int, *, patch_size: int, text_hidden_size: int
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.text_proj = nn.Linear(text_hidden_size, hidden_size)

    def word_embedding_forward(
        self,
        x: Tensor,
        *,
        context: Tensor,
        num_branches: int = 1,
        shard: SequenceShard | None = None,
        **_: object,
    ) -> Tensor:
        """Clip (b, t, c, h, w) and text (k * b, n_text, d_text) -> tokens (k * b, n_text + n, d).

        Video tokens follow the text in t, h, w order, the same for all k = `num_branches`. With a
        `shard`, only this process's tokens are returned.
        """
        frames = rearrange(x, "b t c h w -> (b t) c h w")
        # With channels last, the output is already one row per token.
        frames = frames.contiguous(memory_format=torch.channels_last)
        patches = self.proj(frames)  # ((b t), d, h/p, w/p)
        video = rearrange(patches, "(b t) d h w -> b (t h w) d", b=x.shape[0])  # (b, n, d)
        # With one branch, this is a view.
        video = video.expand(num_branches, *video.shape).flatten(0, 1)
        tokens = torch.cat([self.text_proj(context), video], dim=1)
        return tokens if shard is None else shard.take(tokens)
