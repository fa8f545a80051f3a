"""Position embedding: a fixed 3D sine-cosine table, added to the tokens before the first block."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from sat.model.base_model import BaseMixin
from torch import Tensor, nn

from sgm.distributed import SequenceShard
from sgm.errors import UserError


class Basic3DPositionEmbeddingMixin(BaseMixin):
    """Adds an embedding of frame, column and row to each video token; text tokens get zeros.

    The table covers the grid of patches given here. Frames are the slowest index of the tokens, so
    a shorter clip, or an image, uses the beginning of the table.

    Args:
        num_latent_frames: latent frames of the longest clip.
        grid_size: rows and columns of patches in a frame.
        hidden_size: width d of a token, a multiple of 16.
        text_length: number of text tokens, which precede the video tokens.
        height_interpolation: row numbers are divided by this factor before they are encoded. A
            factor above 1 keeps them in the range in which a model with fewer rows was trained.
        width_interpolation: the same for column numbers.

    Raises:
        UserError: `hidden_size` is not a multiple of 16, or a factor is not positive.
    """

    def __init__(
        self,
        num_latent_frames: int,
        grid_size: tuple[int, int],
        *,
        hidden_size: int,
        text_length: int,
        height_interpolation: float = 1.0,
        width_interpolation: float = 1.0,
    ) -> None:
        super().__init__()
        # Time takes d/4 channels; columns and rows take 3d/8 each. Half of each are sines, the rest
        # cosines.
        if hidden_size % 16:
            raise UserError(
                f"hidden_size={hidden_size}: the 3D position table needs a multiple of 16"
            )
        if not (height_interpolation > 0 and width_interpolation > 0):
            raise UserError(
                f"height_interpolation={height_interpolation} and width_interpolation="
                f"{width_interpolation} in pos_embed_config: both must be above 0"
            )
        self.num_latent_frames = num_latent_frames
        self.grid_size = grid_size
        self.hidden_size = hidden_size
        self.text_length = text_length
        self.height_interpolation = height_interpolation
        self.width_interpolation = width_interpolation
        self.pos_embedding = nn.Parameter(self.compute_table(), requires_grad=False)

    def compute_table(
        self, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """Compute the table (1, text_length + t * h * w, d), tokens in t, h, w order.

        Values are in [-1, 1]. The first quarter of the d channels encodes time, the next 3/8 the
        column and the last 3/8 the row. When a checkpoint lacks ``pos_embed.pos_embedding``, as the
        published ones do, this table is used.
        """
        height, width = self.grid_size
        time_width, space_width = self.hidden_size // 4, self.hidden_size * 3 // 8
        frames = torch.arange(self.num_latent_frames, dtype=torch.float64, device=device)
        rows = torch.arange(height, dtype=torch.float64, device=device) / self.height_interpolation
        columns = torch.arange(width, dtype=torch.float64, device=device) / self.width_interpolation
        # Cast before repeating over the grid, because the whole table would be large in float64.
        of_frame = sine_cosine(frames, time_width).to(dtype)  # (t, d/4)
        of_row = sine_cosine(rows, space_width).to(dtype)  # (h, 3d/8)
        of_column = sine_cosine(columns, space_width).to(dtype)  # (w, 3d/8)
        sizes = {"t": self.num_latent_frames, "h": height, "w": width}
        video = torch.cat(
            [
                repeat(of_frame, "t d -> t h w d", **sizes),
                repeat(of_column, "w d -> t h w d", **sizes),
                repeat(of_row, "h d -> t h w d", **sizes),
            ],
            dim=-1,
        )  # (t, h, w, d)
        text = torch.zeros(1, self.text_length, self.hidden_size, dtype=dtype, device=device)
        return torch.cat([text, rearrange(video, "t h w d -> 1 (t h w) d")], dim=1)

    def position_embedding_forward(
        self,
        position_ids: None,
        *,
        grid: tuple[int, int, int],
        shard: SequenceShard | None = None,
        **_: object,
    ) -> Tensor:
        """Return the embedding (1, text_length + t * h * w, d) for a clip with t * h * w patches.

        With a `shard`, only the rows for this process's tokens are returned.
        """
        num_frames, height, width = grid
        positions = self.pos_embedding[:, : self.text_length + num_frames * height * width]
        return positions if shard is None else shard.take(positions)


def sine_cosine(positions: Tensor, width: int) -> Tensor:
    """Return [sin | cos] of ``position / 10000^(2i / width)``, (n,) -> (n, width), in float64.

    Source: Vaswani et al., "Attention Is All You Need", section 3.5. Unlike in the paper, all sines
    precede all cosines.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions.double()[:, None] / 10000**exponents  # (n, width/2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
