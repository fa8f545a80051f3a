"""The same work in other people's code, diffusers and peft, to measure against.

Sizes come from the configuration, by the way of the converter's files; weights are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.config import Config
from sgm.preflight import weight_paths
from sgm.util import build_on_meta
from tools.bench import inputs
from tools.bench.measuring import Measured, choose_device, measure, randomize
from tools.weights.diffusers_configs import (
    SCHEDULERS,
    geometry_of,
    scheduler_config,
    transformer_config,
    vae_config,
)
from tools.weights.sizes import sizes_of


def training_step(
    config: Config, *, rank: int, device: torch.device
) -> Callable[[Tensor, Tensor], None]:
    """A LoRA step of diffusers' transformer with peft: bf16, gradient checkpointing, AdamW.

    LoRA is on the projections of the attention, where ours is.
    """
    from peft import LoraConfig

    model = _transformer(config, dtype=torch.bfloat16, device=device)
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


@torch.no_grad()
def step(config: Config, options: argparse.Namespace, *, compiled: bool) -> Measured:
    """One forward of the transformer with guidance, on a copy of the latents for each branch."""
    device, dtype = choose_device(), inputs.run_dtype(config)
    model = _transformer(config, dtype=dtype, device=device)
    if compiled:
        _compile(model)
    latents, texts, timestep = inputs.step_inputs(config, device)
    latents, texts, count = latents.to(dtype), texts.to(dtype), len(texts)

    def run() -> None:
        copies = torch.cat([latents] * count)
        model(copies, texts, timestep.expand(count), return_dict=False)

    return measure(run, device=device, **inputs.step_repeats(options, device))


@torch.no_grad()
def decode(config: Config, options: argparse.Namespace, *, tiled: bool) -> Measured:
    """Latents to frames, whole or in the tiles that diffusers chooses."""
    device, dtype = choose_device(), inputs.run_dtype(config)
    vae = _vae(config, dtype=dtype, device=device)
    if tiled:
        vae.enable_tiling()
    latents = inputs.latents(config, device).transpose(1, 2).to(dtype)  # (1, c, t, h, w)
    return measure(lambda: vae.decode(latents), device=device, **inputs.repeats(options))


@torch.no_grad()
def encode(config: Config, options: argparse.Namespace, *, at_once: bool) -> Measured:
    """Frames to moments: eight frames at a time, as diffusers does, or all at once."""
    device, dtype = choose_device(), inputs.run_dtype(config)
    vae = _vae(config, dtype=dtype, device=device)
    video = inputs.video(config, device).transpose(1, 2).to(dtype)  # (1, 3, t, h, w)
    call = vae.encoder if at_once else vae.encode
    return measure(lambda: call(video), device=device, **inputs.repeats(options))


@torch.no_grad()
def embed_text(config: Config, options: argparse.Namespace) -> Measured:
    """A prompt through transformers' T5, with the weights of the configuration."""
    device = choose_device()
    _, embed = _t5(config, device=device)
    return measure(embed, device=device, **inputs.repeats(options))


@torch.no_grad()
def pipeline(config: Config, options: argparse.Namespace) -> Measured:
    """A prompt to frames in diffusers' pipeline, as many steps and the same guidance.

    The unconditional embedding is zeros here too: T5 runs once, where diffusers' default is twice.
    """
    import diffusers

    device, dtype = choose_device(), inputs.run_dtype(config)
    sampler = config.model["sampler_config"]
    scheduler = SCHEDULERS[sampler["target"].rpartition(".")[2]]
    encoder, embed = _t5(config, device=device)
    parts = diffusers.CogVideoXPipeline(
        tokenizer=None,  # the embedding is there
        text_encoder=encoder,
        vae=_vae(config, dtype=dtype, device=device),
        transformer=_transformer(config, dtype=dtype, device=device),
        scheduler=getattr(diffusers, scheduler).from_config(
            scheduler_config(scheduler, snr_shift_scale=1.0)
        ),
    )
    parts.set_progress_bar_config(disable=True)
    if options.compile:
        _compile(parts.transformer)
    _, num_frames, _, height, width = inputs.video_shape(config)

    def make(num_steps: int) -> None:
        text = embed().to(dtype)
        parts(
            prompt_embeds=text,
            negative_prompt_embeds=torch.zeros_like(text),
            max_sequence_length=text.shape[1],
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_steps,
            guidance_scale=6.0,
            use_dynamic_cfg=True,
            output_type="np",
        )

    times = inputs.repeats(options, steps=1)
    for _ in range(times["warmup"]):
        make(inputs.WARMUP_STEPS)
    num_steps = sampler["params"]["num_steps"]
    return measure(lambda: make(num_steps), device=device, warmup=0, steps=times["steps"])


def _transformer(config: Config, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    node = config.model["network_config"]
    sizes = sizes_of(build_on_meta(node).state_dict(), "transformer", "the configuration")
    model = _build(transformer_config(sizes, geometry_of(node["params"])), dtype, device=device)
    randomize(model)
    return model


def _vae(config: Config, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    node = config.model["first_stage_config"]
    sizes = sizes_of(build_on_meta(node).state_dict(), "vae", "the configuration")
    geometry = geometry_of(config.model["network_config"]["params"])
    return _build(vae_config(sizes, geometry, scaling_factor=1.0), dtype, device=device)


def _build(config: dict[str, Any], dtype: torch.dtype, *, device: torch.device) -> nn.Module:
    """The model of a config.json, with the random weights of its constructor."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # it advises against `to`, which harms no noise
    with device:
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    return model.to(dtype).eval().requires_grad_(False)


def _compile(model: Any) -> None:
    """Its blocks one by one: as fast as the whole at a fraction of the time for compiling."""
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, dynamic=False)


def _t5(config: Config, *, device: torch.device) -> tuple[Any, Callable[[], Tensor]]:
    """transformers' encoder with the weights of the configuration, and what embeds the prompt."""
    from transformers import T5EncoderModel

    from sgm.checkpoint.find import find_t5
    from sgm.modules.encoders.modules import T5Tokenizer

    _, text, *_ = weight_paths(config.model)
    files = find_t5(text.path())
    length = inputs.t5_params(config)["max_length"]
    tokenizer = T5Tokenizer(files.tokenizer, max_length=length)
    encoder = T5EncoderModel.from_pretrained(
        Path(files.folder), dtype=inputs.run_dtype(config), local_files_only=True
    )
    encoder.to(device).eval()
    return encoder, lambda: encoder(tokenizer([inputs.PROMPT]).to(device)).last_hidden_state
