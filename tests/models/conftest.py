"""What the tests of whole models share: the configuration of the transformer's goldens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDENS = Path(__file__).parents[1] / "goldens"
PREFIX = "sgm.modules.transformer"


def modules_config(
    *,
    text_length: int,
    text_hidden_size: int,
    height_interpolation: float,
    width_interpolation: float,
    lora: dict[str, Any] | None,
) -> dict[str, Any]:
    """The nodes of the transformer's parts, as a configuration writes them."""
    nodes: dict[str, Any] = {
        "pos_embed_config": {
            "target": f"{PREFIX}.position_embedding.Basic3DPositionEmbeddingMixin",
            "params": {
                "text_length": text_length,
                "height_interpolation": height_interpolation,
                "width_interpolation": width_interpolation,
            },
        },
        "patch_embed_config": {
            "target": f"{PREFIX}.patch_embedding.ImagePatchEmbeddingMixin",
            "params": {"text_hidden_size": text_hidden_size},
        },
        "adaln_layer_config": {
            "target": f"{PREFIX}.adaln.AdaLNMixin",
            "params": {"qk_ln": True},
        },
        "final_layer_config": {"target": f"{PREFIX}.final_layer.FinalLayerMixin"},
    }
    if lora is not None:
        nodes["lora_config"] = {"target": "sat.model.finetune.lora2.LoraMixin", "params": lora}
    return nodes


def small_transformer_config(
    *,
    width_interpolation: float = 1.875,
    lora: dict[str, Any] | None = None,
    transformer_args: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Constructor arguments of the goldens' transformer: the 2B model with small sizes."""
    return {
        "time_embed_dim": 32,
        "elementwise_affine": True,
        "num_frames": 9,
        "time_compressed_rate": 4,
        "latent_width": 12,
        "latent_height": 8,
        "num_layers": 2,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "transformer_args": {
            "checkpoint_activations": False,
            "vocab_size": 1,
            "max_sequence_length": 64,
            "layernorm_order": "pre",
            "skip_init": False,
            "model_parallel_size": 1,
            "is_decoder": False,
            **(transformer_args or {}),
        },
        "modules": modules_config(
            text_length=10,
            text_hidden_size=48,
            height_interpolation=1.875,
            width_interpolation=width_interpolation,
            lora=lora,
        ),
        **changes,
    }


def full_transformer_config(*, lora: dict[str, Any] | None = None) -> dict[str, Any]:
    """Constructor arguments of the published 2B transformer."""
    return small_transformer_config(
        num_layers=30,
        hidden_size=1920,
        num_attention_heads=30,
        time_embed_dim=512,
        num_frames=49,
        latent_width=90,
        latent_height=60,
        modules=modules_config(
            text_length=226,
            text_hidden_size=4096,
            height_interpolation=1.875,
            width_interpolation=1.875,
            lora=lora,
        ),
    )


@pytest.fixture
def small_config() -> Callable[..., dict[str, Any]]:
    return small_transformer_config


@pytest.fixture
def full_config() -> Callable[..., dict[str, Any]]:
    return full_transformer_config


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    return lambda name: load_file(GOLDENS / f"{name}.safetensors")


def fill_with_noise(model: nn.Module) -> None:
    """Random weights, seeded: a fresh model predicts zeros, which would hide a difference.

    Scales stay near 1 and the position table as it was computed.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embedding" in name:
                continue
            is_scale = "norm" in name and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.1 + is_scale)


@pytest.fixture
def randomize() -> Callable[[nn.Module], None]:
    return fill_with_noise
