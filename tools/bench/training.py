"""The training jobs: steps with this project's objective, DeepSpeed's engine and the optimizer.

Weights are random, because time and memory do not depend on their values. Latents and text
embeddings are random too, and are passed in as if they came from a cache (`args.cache_dir`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from sgm.checkpoint.transformer import is_lora_matrix
from sgm.config import Config
from sgm.engine import NetworkWrapper
from sgm.models.transformer import DiffusionTransformer
from sgm.modules.transformer.attention import check_attention
from sgm.training.deepspeed_engine import start_deepspeed
from sgm.training.loop import TrainingObjective
from sgm.util import instantiate_from_config
from tools.bench import diffusers_baseline
from tools.bench.jobs import Job
from tools.bench.measuring import Measured, Workload, forward_flops, random_network


def training_jobs(config: Config, options: argparse.Namespace) -> list[Job]:
    """Return a job for each training method and checkpointing policy in `options`.

    Each job runs in its own process. A diffusers job is added if `options.against` is set.
    """
    work = Workload(config, options)
    settings = ", compiled" if options.compile else ""
    settings += f", {options.attention}" if options.attention != "auto" else ""
    lines = {
        f"{method}, keep {keep}{settings}": partial(own_step, work, method, keep=keep)
        for method in options.methods
        for keep in options.keep
    }
    jobs = [Job("train", label, run, process=label) for label, run in lines.items()]
    if options.against:
        label, run = "diffusers, LoRA", partial(diffusers_baseline.training_step, work)
        jobs.append(Job("train", label, run, process=label, is_reference=True))
    return jobs


def own_step(work: Workload, method: str, *, keep: str) -> Measured:
    """Measure a training step of this project.

    Args:
        work: the sizes; its options choose compiling, the attention kernel and the LoRA rank.
        method: one of METHODS.
        keep: the policy for `DiffusionTransformer.set_checkpointing`, or "all" to store all
            activations (no checkpointing).
    """
    config = work.config
    network = build_network(work, method, keep=keep)
    engine = SimpleNamespace(
        model=NetworkWrapper(network),
        denoiser=instantiate_from_config(config.model["denoiser_config"]),
        conditioner=instantiate_from_config(
            config.model["conditioner_config"], with_embedders=False
        ),
        loss_fn=instantiate_from_config(config.model["loss_fn_config"]),
    )
    settings = deepspeed_settings(config, offload=method == "offload")
    wrapped = start_deepspeed(TrainingObjective(engine).train(), settings, config.args)
    latents, context = work.training_inputs()

    def step() -> None:
        loss = wrapped(latents, {"crossattn": context})
        wrapped.backward(loss)
        wrapped.step()

    num_tokens = context.shape[1] + math.prod(network.grid_size) * network.num_latent_frames
    flops = step_flops(network, num_tokens=num_tokens)
    return dataclasses.replace(work.measure_step(step), flops=flops)


def build_network(work: Workload, method: str, *, keep: str) -> DiffusionTransformer:
    """Build the configured transformer with random weights, set up for `own_step`.

    Raises:
        UserError: the attention kernel does not run on the device.
    """
    options, model = work.options, work.config.model
    check_attention(options.attention, model, device=work.device, dtype=torch.bfloat16)
    node = copy.deepcopy(model["network_config"])
    modules = node["params"]["modules"]
    modules.pop("lora_config", None)
    if method == "lora":
        target = "sat.model.finetune.lora2.LoraMixin"
        modules["lora_config"] = {"target": target, "params": {"r": options.rank}}
    network = random_network(node, dtype=torch.bfloat16, device=work.device)
    if method == "lora":
        for name, weight in network.named_parameters():
            weight.requires_grad_(is_lora_matrix(name))
    network.set_checkpointing(None if keep == "all" else keep)
    network.set_attention(options.attention)
    if options.compile:
        network.compile_blocks(tune=True)
    return network


def step_flops(network: DiffusionTransformer, *, num_tokens: int) -> float:
    """Return the FLOPs of a training step of one sample, without recomputed activations.

    The backward pass of a matrix product costs as much as the forward pass for each factor that
    needs a gradient. The activation always needs one; the weight needs one only if it is trained.
    """
    weights = [weight for weight in network.transformer.layers.parameters() if weight.ndim == 2]
    width, num_layers = network.hidden_size, len(network.transformer.layers)
    frozen = sum(weight.numel() for weight in weights if not weight.requires_grad)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    attention = forward_flops(0, num_tokens=num_tokens, num_layers=num_layers, width=width)
    return 2 * num_tokens * (2.0 * frozen + 3.0 * trained) + 3 * attention


def deepspeed_settings(config: Config, *, offload: bool) -> dict[str, Any]:
    """Return the `deepspeed` section, changed to bf16, PyTorch's fused AdamW and batch size 1."""
    params = dict(config.deepspeed["optimizer"].get("params") or {})
    zero = dict(config.deepspeed.get("zero_optimization") or {})
    # A single process has no communication to overlap; the option would make it wait for the GPU.
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
