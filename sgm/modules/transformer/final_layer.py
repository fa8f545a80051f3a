"""The last layer, which converts video tokens to a latent clip."""

from __future__ import annotations

from einops import rearrange
from sat.model.base_model import BaseMixin
from torch import Tensor, nn

from sgm.distributed import SequenceShard
from sgm.modules.transformer.adaln import modulate, zero_linear

FINAL_NORM_EPSILON = 1e-6


class FinalLayerMixin(BaseMixin):
    """Adaptive LayerNorm, and a Linear that converts each token to a patch of a frame.

    The Linears start at zero, so a new model predicts zeros (Peebles and Xie, "Scalable Diffusion
    Models with Transformers", section 3.2).

    Args:
        hidden_size: width d of a token.
        out_channels: channels of the result.
        patch_size: height and width p of a patch, in latent pixels.
        time_embed_dim: width of the time embedding.
        elementwise_affine: whether the norm has weight and bias.
    """

    def __init__(
        self,
        hidden_size: int,
        out_channels: int,
        *,
        patch_size: int,
        time_embed_dim: int,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_final = nn.LayerNorm(
            hidden_size, eps=FINAL_NORM_EPSILON, elementwise_affine=elementwise_affine
        )
        self.linear = zero_linear(hidden_size, out_channels * patch_size**2)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), zero_linear(time_embed_dim, 2 * hidden_size)
        )

    def final_forward(
        self,
        tokens: Tensor,
        *,
        time_embedding: Tensor,
        text_length: int,
        grid: tuple[int, int, int],
        shard: SequenceShard | None = None,
        **_: object,
    ) -> Tensor:
        """Convert tokens (b, text_length + t * h * w, d) to a clip (b, t, c, h * p, w * p).

        `grid` is (t, h, w). The channel is the slowest index within a patch. With a `shard`,
        `tokens` are only those of this process, and every process gets the whole result.
        """
        if shard is not None:
            tokens = shard.gather(tokens)
        shift, scale = rearrange(
            self.adaLN_modulation(time_embedding), "b (part d) -> part b 1 d", part=2
        )  # (b, 1, d) each
        video = modulate(self.norm_final(tokens[:, text_length:]), shift, scale=scale)
        num_frames, height, width = grid
        return rearrange(
            self.linear(video),
            "b (t h w) (c p q) -> b t c (h p) (w q)",
            t=num_frames,
            h=height,
            w=width,
            p=self.patch_size,
            q=self.patch_size,
        )
