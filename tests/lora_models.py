"""A small transformer here and the same in diffusers, and LoRAs for both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgm.checkpoint.find import MODEL_FILES
from sgm.checkpoint.lora import lora_record, merge_updates, read_updates
from sgm.checkpoint.table import to_diffusers
from sgm.checkpoint.transformer import MODEL_PREFIX, fingerprint, is_lora_matrix
from sgm.config import LoraChoice
from sgm.models.transformer import DiffusionTransformer
from tests.models.conftest import small_transformer_config

WIDTH = 64


def randomize(module: nn.Module, *, lora: bool = False) -> None:
    """Fill the base weights, or with `lora` the matrices, with seeded noise that shows."""
    generator = torch.Generator().manual_seed(int(lora))
    weights = {n.replace(".original.", "."): w for n, w in module.named_parameters()}
    with torch.no_grad():
        for name in sorted(weights):
            is_matrix = is_lora_matrix(name) or ".lora_" in name
            if is_matrix == lora and "pos_embedding" not in name:
                weights[name].normal_(std=0.3 if lora else 0.1, generator=generator)
                if "norm" in name and name.endswith("weight"):  # a scale
                    weights[name].add_(1)


def build(lora: dict[str, Any] | None = None, **changes: Any) -> DiffusionTransformer:
    """The small transformer with random weights, which LoRA does not change."""
    network = DiffusionTransformer(**small_transformer_config(lora=lora, **changes)).eval()
    randomize(network)
    randomize(network, lora=True)
    return network


def build_theirs(network: DiffusionTransformer) -> nn.Module:
    """diffusers' transformer with the base weights of `network`."""
    import diffusers

    theirs = diffusers.CogVideoXTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        text_embed_dim=48,
        in_channels=16,
        out_channels=16,
        time_embed_dim=32,
        max_text_seq_length=10,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        temporal_compression_ratio=4,
        patch_size=2,
        spatial_interpolation_scale=1.875,
        use_rotary_positional_embeddings=False,
    ).eval()
    weights = to_diffusers(network.state_dict(), "transformer", where="ours")
    theirs.load_state_dict(dict(weights), strict=True)
    return theirs


def merge_loras(
    network: DiffusionTransformer, loras: Sequence[LoraChoice], *, base: str | None = None
) -> None:
    """Merge LoRAs into a network; None for `base` takes the fingerprint of its own weights."""
    weights = dict(network.named_parameters())
    updates = read_updates(loras, weights)
    merge_updates(network, updates, base=base or fingerprint(weights))


def predict(network: nn.Module) -> Tensor:
    """The prediction of either model for one fixed input."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, 16, 8, 12, generator=generator)
    context = torch.randn(1, 10, 48, generator=generator)
    with torch.no_grad():
        if isinstance(network, DiffusionTransformer):
            return network(x, torch.tensor([731]), context=context)
        return network(x, context, torch.tensor([731])).sample


def save_base(network: DiffusionTransformer, path: Path) -> Path:
    """The weights of a network without LoRA as a file of SAT format."""
    torch.save({"module": {MODEL_PREFIX + n: w for n, w in network.state_dict().items()}}, path)
    return path


def save_run(network: DiffusionTransformer, folder: Path, *, base: str | None = None) -> Path:
    """What a LoRA run leaves: ``latest`` and one iteration."""
    matrices = {MODEL_PREFIX + n: w for n, w in network.named_parameters() if is_lora_matrix(n)}
    file = folder / "20" / MODEL_FILES[0]
    file.parent.mkdir(parents=True)
    torch.save({"module": matrices, "lora": lora_record(network, base)}, file)
    (folder / "latest").write_text("20")
    return folder
