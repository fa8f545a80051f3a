"""Embedding of the text and the latent clip as one sequence of tokens."""

from __future__ import annotations

import torch
from einops import rearrange
from sat.model.base_model import BaseMixin
from torch import Tensor, nn

from sgm.distributed import SequenceShard


class ImagePatchEmbeddingMixin(BaseMixin):
    """Embeds text tokens and the square patches of each frame, all to width `hidden_size`.

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
        """Embed clip `x` (b, t, c, h, w) and text `context` (k * b, n_text, d_text) as tokens.

        Returns:
            Tokens (k * b, n_text + n, d). The n video tokens follow the text in t, h, w order; they
            are equal in all k = `num_branches` branches of guidance. With a `shard`, only this
            process's tokens are returned.
        """
        frames = rearrange(x, "b t c h w -> (b t) c h w")
        # In channels-last format, each token is one contiguous row of the output.
        frames = frames.contiguous(memory_format=torch.channels_last)
        patches = self.proj(frames)  # ((b t), d, h/p, w/p)
        video = rearrange(patches, "(b t) d h w -> b (t h w) d", b=x.shape[0])  # (b, n, d)
        # This copies nothing if there is only one branch.
        video = video.expand(num_branches, *video.shape).flatten(0, 1)
        tokens = torch.cat([self.text_proj(context), video], dim=1)
        return tokens if shard is None else shard.take(tokens)
