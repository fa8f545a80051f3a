"""Training steps: the project's own objective, DeepSpeed's engine and the optimizer.

Weights are random, since time and memory do not depend on their values. Latents and text
embeddings are random too and are given as from a cache (`args.cache_dir`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sgm.checkpoint.transformer import is_lora_matrix
from sgm.config import Config
from sgm.engine import NetworkWrapper
from sgm.models.transformer import DiffusionTransformer
from sgm.modules.transformer.attention import check_attention
from sgm.training.deepspeed_engine import start_deepspeed
from sgm.training.loop import TrainingObjective
from sgm.util import instantiate_from_config
from tools.bench import diffusers_baseline
from tools.bench.jobs import METHODS, Job
from tools.bench.measuring import Measured, forward_flops, random_network
from tools.bench.workload import Workload


@dataclass(frozen=True)
class Variant:
    """A method of training, with the settings of the transformer.

    Args:
        method: one of METHODS, or "diffusers".
        keep: the activation checkpointing policy of `DiffusionTransformer.set_checkpointing`.
        compiled: compile the blocks.
        kernel: of attention.
    """

    method: str
    keep: str | None = "attention"
    compiled: bool = True
    kernel: str = "auto"

    def label(self) -> str:
        """The variant as the table of results names it."""
        if self.method not in METHODS:
            return f"{self.method}, LoRA"
        parts = [self.method, f"keep {self.keep or 'all'}"]
        parts += ["compiled"] if self.compiled else []
        return ", ".join(parts + ([self.kernel] if self.kernel != "auto" else []))


def training_jobs(config: Config, options: argparse.Namespace) -> list[Job]:
    """A job for each variant in the options, each with a process of its own."""
    variants = [
        Variant(method, None if keep == "all" else keep, options.compile, options.attention)
        for method in options.methods
        for keep in options.keep
    ]
    if options.against:
        variants.append(Variant(options.against))
    return [
        Job(
            "train",
            variant.label(),
            partial(run_variant, config, variant, options),
            process=variant.label(),
            is_reference=variant.method == options.against,
        )
        for variant in variants
    ]


def run_variant(config: Config, variant: Variant, options: argparse.Namespace) -> Measured:
    """Build and measure one variant."""
    work, flops = Workload(config, options), None
    if variant.method in METHODS:
        step, flops = own_step(work, variant)
    else:
        step = diffusers_baseline.training_step(work)
    sample = random_inputs(work)
    measured = work.measure(lambda: step(*sample), warmup=3, steps=10)
    return dataclasses.replace(measured, flops=flops)


def own_step(work: Workload, variant: Variant) -> tuple[Callable[[Tensor, Tensor], None], float]:
    """A training step of (latents, text embedding) in this project, and its operations."""
    config = work.config
    network = build_network(config, variant, rank=work.options.rank, device=work.device)
    engine = SimpleNamespace(
        model=NetworkWrapper(network),
        denoiser=instantiate_from_config(config.model["denoiser_config"]),
        conditioner=instantiate_from_config(
            config.model["conditioner_config"], with_embedders=False
        ),
        loss_fn=instantiate_from_config(config.model["loss_fn_config"]),
    )
    settings = deepspeed_settings(config, offload=variant.method == "offload")
    wrapped = start_deepspeed(TrainingObjective(engine).train(), settings, config.args)
    num_tokens = network.mixins["pos_embed"].text_length
    num_tokens += math.prod(network.grid_size) * network.num_latent_frames

    def step(latents: Tensor, context: Tensor) -> None:
        loss = wrapped(latents, {"crossattn": context})
        wrapped.backward(loss)
        wrapped.step()

    return step, step_flops(network, num_tokens=num_tokens)


def build_network(
    config: Config, variant: Variant, *, rank: int, device: torch.device
) -> DiffusionTransformer:
    """The transformer of a configuration with random weights, set up for the variant.

    Raises:
        UserError: the kernel of attention does not run on the device.
    """
    node = copy.deepcopy(config.model["network_config"])
    modules = node["params"]["modules"]
    modules.pop("lora_config", None)
    if variant.method == "lora":
        target = "sat.model.finetune.lora2.LoraMixin"
        modules["lora_config"] = {"target": target, "params": {"r": rank}}
    check_attention(variant.kernel, config.model, device=device, dtype=torch.bfloat16)
    network = random_network(node, dtype=torch.bfloat16, device=device)
    if variant.method == "lora":
        for name, weight in network.named_parameters():
            weight.requires_grad_(is_lora_matrix(name))
    network.set_checkpointing(variant.keep)
    network.set_attention(variant.kernel)
    if variant.compiled:
        network.compile_blocks(tune=True)
    return network


def step_flops(network: DiffusionTransformer, *, num_tokens: int) -> float:
    """Operations of a training step of one sample, without recomputed activations.

    The backward pass of a matrix product costs as much as its forward pass for each factor that has
    a gradient: the activation always, the weight if it is trained.
    """
    weights = [weight for weight in network.transformer.layers.parameters() if weight.ndim == 2]
    width, num_layers = network.hidden_size, len(network.transformer.layers)
    frozen = sum(weight.numel() for weight in weights if not weight.requires_grad)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    attention = forward_flops(0, num_tokens=num_tokens, num_layers=num_layers, width=width)
    return 2 * num_tokens * (2.0 * frozen + 3.0 * trained) + 3 * attention


def deepspeed_settings(config: Config, *, offload: bool) -> dict[str, Any]:
    """The `deepspeed` section in bf16 with PyTorch's fused AdamW, one sample at a time."""
    params = dict(config.deepspeed["optimizer"].get("params") or {})
    zero = dict(config.deepspeed.get("zero_optimization") or {})
    # A single process has no communication to overlap, and would wait for the GPU.
    zero |= {"stage": max(zero.get("stage", 0), 2), "overlap_comm": False}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        **config.deepspeed,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {**(config.deepspeed.get("bf16") or {}), "enabled": True},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": params | {"torch_adam": True, "fused": True}},
    }


def random_inputs(work: Workload) -> tuple[Tensor, Tensor]:
    """Latents (1, t, c, h, w) float32 and a text embedding (1, n, d) bf16 of the model's sizes."""
    params = work.config.model["network_config"]["params"]
    frames = (params["num_frames"] - 1) // params["time_compressed_rate"] + 1
    shape = (params["in_channels"], params["latent_height"], params["latent_width"])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, frames, *shape, generator=generator)
    context = torch.randn(1, *work.text_shape(), generator=generator)
    return latents.to(work.device), context.to(work.device, torch.bfloat16)
