"""The autoencoder as diffusion uses it: frozen, on videos and latents in the order b t c h w."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sgm.util import instantiate_part


def build_first_stage(
    config: Mapping[str, Any], *, dtype: torch.dtype, device: str | torch.device
) -> nn.Module:
    """The autoencoder of a node, frozen and in evaluation mode.

    Raises:
        UserError: the node or the file of weights is wrong.
    """
    needs = ("encode", "decode_streamed", "regularization")
    # No local name for it: the first call imports modules, some of which keep this frame alive.
    return (
        instantiate_part(config, "first_stage_config", needs=needs)
        .to(device=device, dtype=dtype)
        .eval()
        .requires_grad_(False)
    )


@torch.no_grad()
def encode_moments(first_stage: nn.Module, video: Tensor) -> Tensor:
    """Video (b, t, 3, h, w) in [-1, 1] → moments (b, t', 2c, h/8, w/8) in the weights' dtype.

    A sample's moments are the same to the last bit whatever else is in the batch, so that kept ones
    can stand for them.
    """
    device = next(first_stage.parameters()).device
    pixels = rearrange(video.to(device), "b t c h w -> b c t h w")
    moments, _ = first_stage.encode(pixels, unregularized=True)
    return rearrange(moments, "b c t h w -> b t c h w")


def draw_latents(regularizer: nn.Module, moments: Tensor) -> Tensor:
    """Moments (b, t', 2c, h, w) → latents (b, t', c, h, w), float32, not yet scaled.

    The noise comes from torch's global generator.
    """
    latents = regularizer(rearrange(moments, "b t c h w -> b c t h w"))
    return rearrange(latents.float(), "b c t h w -> b t c h w")
