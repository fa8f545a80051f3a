"""The baseline: the same work in diffusers and peft.

Model sizes come from the configuration, through the config files that the converter writes. All
weights are random, except those of T5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.preflight import weight_paths
from sgm.util import build_on_meta
from tools.bench.measuring import PROMPT, Measured, Workload, randomize, t5_params
from tools.weights.diffusers_configs import (
    SCHEDULERS,
    geometry_of,
    scheduler_config,
    transformer_config,
    vae_config,
)
from tools.weights.sizes import sizes_of


def training_step(work: Workload) -> Measured:
    """Measure a LoRA training step of diffusers and peft: bf16, gradient checkpointing, AdamW.

    LoRA adapts the attention projections, as in this project.
    """
    from peft import LoraConfig

    model, rank = _transformer(work, torch.bfloat16), work.options.rank
    model.enable_gradient_checkpointing()
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    signal = torch.linspace(0.9999, 0.0, 1000, device=work.device)  # any schedule costs the same
    latents, context = work.training_inputs()

    def step() -> None:
        clean = latents.to(torch.bfloat16)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=work.device)
        level = signal[timesteps].view(-1, 1, 1, 1, 1).to(clean)
        noisy = level * clean + (1 - level**2) ** 0.5 * noise
        velocity = model(noisy, context, timesteps, return_dict=False)[0]
        target = level * noise - (1 - level**2) ** 0.5 * clean
        F.mse_loss(velocity.float(), target.float()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return work.measure_step(step)


@torch.no_grad()
def step(work: Workload, *, compiled: bool = False) -> Measured:
    """Measure a forward pass of the transformer with guidance, which copies the latents."""
    model = _transformer(work, work.dtype)
    if compiled:
        _compile(model)
    latents, texts, timestep = work.step_inputs()
    latents, texts, count = latents.to(work.dtype), texts.to(work.dtype), len(texts)

    def run() -> None:
        copies = torch.cat([latents] * count)
        model(copies, texts, timestep.expand(count), return_dict=False)

    return work.measure_step(run)


@torch.no_grad()
def decode(work: Workload, *, tiled: bool = False) -> Measured:
    """Measure decoding latents to frames, whole or in tiles of diffusers' default size."""
    vae = _vae(work)
    if tiled:
        vae.enable_tiling()
    latents = work.latents().transpose(1, 2).to(work.dtype)  # (1, c, t, h, w)
    return work.measure(lambda: vae.decode(latents))


@torch.no_grad()
def encode(work: Workload, *, at_once: bool = False) -> Measured:
    """Measure encoding frames to moments, eight at a time (diffusers' default) or all at once."""
    vae = _vae(work)
    video = work.video().transpose(1, 2).to(work.dtype)  # (1, 3, t, h, w)
    call = vae.encoder if at_once else vae.encode
    return work.measure(lambda: call(video))


@torch.no_grad()
def embed_text(work: Workload) -> Measured:
    """Measure embedding a prompt with transformers' T5 and the weights of the configuration."""
    return work.measure(_t5(work))


@torch.no_grad()
def pipeline(work: Workload) -> Measured:
    """Measure diffusers' pipeline from prompt to frames, with the same steps and guidance.

    The unconditional embedding is zero, as in this project. So T5 runs only once per video; by
    default diffusers runs it twice.
    """
    import diffusers

    scheduler = SCHEDULERS[work.config.model["sampler_config"]["target"].rpartition(".")[2]]
    embed = _t5(work)
    parts = diffusers.CogVideoXPipeline(
        tokenizer=None,  # the pipeline gets embeddings
        text_encoder=None,
        vae=_vae(work),
        transformer=_transformer(work, work.dtype),
        scheduler=getattr(diffusers, scheduler).from_config(
            scheduler_config(scheduler, snr_shift_scale=1.0)
        ),
    )
    parts.set_progress_bar_config(disable=True)
    if work.options.compile:
        _compile(parts.transformer)
    _, num_frames, _, height, width = work.video_shape()

    def make(num_steps: int) -> None:
        text = embed().to(work.dtype)
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

    return work.measure_videos(make)


def _transformer(work: Workload, dtype: torch.dtype) -> nn.Module:
    node = work.config.model["network_config"]
    sizes = sizes_of(build_on_meta(node).state_dict(), "transformer", "the configuration")
    model = _build(transformer_config(sizes, geometry_of(node["params"])), dtype, work.device)
    randomize(model)
    return model


def _vae(work: Workload) -> nn.Module:
    node = work.config.model["first_stage_config"]
    sizes = sizes_of(build_on_meta(node).state_dict(), "vae", "the configuration")
    geometry = geometry_of(work.config.model["network_config"]["params"])
    return _build(vae_config(sizes, geometry, scaling_factor=1.0), work.dtype, work.device)


def _build(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Build the model that a config.json describes, with the random weights of its constructor."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # hides its warning about `to`
    with device:
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    return model.to(dtype).eval().requires_grad_(False)


def _compile(model: nn.Module) -> None:
    """Compile block by block, which runs as fast as a whole compiled model and compiles sooner."""
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, dynamic=False)


def _t5(work: Workload) -> Callable[[], Tensor]:
    """Return a function that embeds PROMPT with transformers' T5 and the configured weights."""
    from transformers import T5EncoderModel

    from sgm.checkpoint.find import find_t5
    from sgm.modules.encoders.modules import T5Tokenizer

    _, text, *_ = weight_paths(work.config.model)
    files = find_t5(text.path())
    tokenizer = T5Tokenizer(files.tokenizer, max_length=t5_params(work.config)["max_length"])
    encoder = T5EncoderModel.from_pretrained(files.path, dtype=work.dtype, local_files_only=True)
    encoder.to(work.device).eval()
    return lambda: encoder(tokenizer([PROMPT]).to(work.device)).last_hidden_state
