"""The same training in other people's code, to measure against (see tools/benchmark.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arguments import Config
from sgm.errors import UserError
from tools.benchmark import randomize


def diffusers_step(
    config: Config, *, rank: int, device: torch.device
) -> Callable[[Tensor, Tensor], None]:
    """A LoRA step of diffusers' transformer with peft: bf16, gradient checkpointing, AdamW.

    LoRA is on the projections of the attention, where ours is.

    Raises:
        UserError: diffusers or peft is not installed.
    """
    try:
        from diffusers import CogVideoXTransformer3DModel
        from peft import LoraConfig
    except ImportError as error:
        raise UserError(f"--against diffusers: {error}; pip install diffusers peft") from None

    with device:
        model = CogVideoXTransformer3DModel(**_sizes(config.model["network_config"]["params"]))
    model.to(torch.bfloat16).to(device).requires_grad_(False)
    randomize(model)
    model.enable_gradient_checkpointing()
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    signal = torch.linspace(0.9999, 0.0, 1000, device=device)  # any schedule costs the same

    def step(latents: Tensor, context: Tensor) -> None:
        clean = latents.to(torch.bfloat16)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=device)
        level = signal[timesteps].view(-1, 1, 1, 1, 1).to(clean)
        noisy = level * clean + (1 - level**2) ** 0.5 * noise
        velocity = model(noisy, context, timesteps, return_dict=False)[0]
        target = level * noise - (1 - level**2) ** 0.5 * clean
        F.mse_loss(velocity.float(), target.float()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sizes(params: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments in diffusers for a `network_config` of this repository."""
    modules = params["modules"]
    position = modules["pos_embed_config"]["params"]
    heads = params["num_attention_heads"]
    return {
        "num_attention_heads": heads,
        "attention_head_dim": params["hidden_size"] // heads,
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "time_embed_dim": params["time_embed_dim"],
        "text_embed_dim": modules["patch_embed_config"]["params"]["text_hidden_size"],
        "num_layers": params["num_layers"],
        "sample_width": params["latent_width"],
        "sample_height": params["latent_height"],
        "sample_frames": params["num_frames"],
        "patch_size": params["patch_size"],
        "temporal_compression_ratio": params["time_compressed_rate"],
        "max_text_seq_length": position["text_length"],
        "spatial_interpolation_scale": position["height_interpolation"],
    }
