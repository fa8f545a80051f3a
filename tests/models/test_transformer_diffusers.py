"""The diffusion transformer against an independent implementation, diffusers' CogVideoX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgm.models.transformer import DiffusionTransformer

diffusers = pytest.importorskip("diffusers")

WEIGHT_AND_BIAS = ("weight", "bias")
# Ours to theirs, for what is stored alike.
SHARED = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "transformer.final_layernorm": "norm_final",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "mixins.final_layer.linear": "proj_out",
}
SHARED_OF_LAYER = {
    "transformer.layers.{i}.input_layernorm": "transformer_blocks.{i}.norm1.norm",
    "transformer.layers.{i}.post_attention_layernorm": "transformer_blocks.{i}.norm2.norm",
    "transformer.layers.{i}.attention.dense": "transformer_blocks.{i}.attn1.to_out.0",
    "transformer.layers.{i}.mlp.dense_h_to_4h": "transformer_blocks.{i}.ff.net.0.proj",
    "transformer.layers.{i}.mlp.dense_4h_to_h": "transformer_blocks.{i}.ff.net.2",
    "mixins.adaln_layer.query_layernorm_list.{i}": "transformer_blocks.{i}.attn1.norm_q",
    "mixins.adaln_layer.key_layernorm_list.{i}": "transformer_blocks.{i}.attn1.norm_k",
}


def to_diffusers(ours: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Our state dict under diffusers' names; its own position table is left to it."""
    theirs = {}
    for kind in WEIGHT_AND_BIAS:
        for own, other in SHARED.items():
            theirs[f"{other}.{kind}"] = ours[f"{own}.{kind}"]
        for i in range(num_layers):
            for own, other in SHARED_OF_LAYER.items():
                theirs[f"{other.format(i=i)}.{kind}"] = ours[f"{own.format(i=i)}.{kind}"]
            block = f"transformer_blocks.{i}"
            qkv = ours[f"transformer.layers.{i}.attention.query_key_value.{kind}"]
            for name, part in zip("qkv", qkv.chunk(3), strict=True):
                theirs[f"{block}.attn1.to_{name}.{kind}"] = part
            # We: video (attention, MLP), then text. They: attention (video, text), then MLP.
            modulation = ours[f"mixins.adaln_layer.adaLN_modulations.{i}.1.{kind}"]
            video_attention, video_mlp, text_attention, text_mlp = modulation.chunk(4)
            theirs[f"{block}.norm1.linear.{kind}"] = torch.cat([video_attention, text_attention])
            theirs[f"{block}.norm2.linear.{kind}"] = torch.cat([video_mlp, text_mlp])
    return theirs


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
    theirs.load_state_dict(to_diffusers(ours.state_dict(), num_layers=2), strict=True)

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
