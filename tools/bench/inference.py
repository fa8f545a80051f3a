"""Sampling, piece by piece and as a whole: this project's own side, and the list of all lines.

Each piece is built alone, so that its peak of memory is its own; the whole is the engine of
sample_video.py with files of weights.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from sgm.cli import no_garbage_collection
from sgm.config import Config
from sgm.engine import NetworkWrapper
from sgm.models.autoencoder import build_first_stage, encode_moments
from sgm.modules.transformer.attention import Kernel, check_attention, list_kernels
from sgm.modules.transformer.linear import fp8_runs_on, quantize_linears
from sgm.pipeline import CogVideoX
from sgm.preflight import check_sampling, head_size
from sgm.util import instantiate_from_config
from tools.bench import diffusers_baseline, inputs
from tools.bench.jobs import INFERENCE_SECTIONS, DoesNotApply, Job
from tools.bench.measuring import (
    Measured,
    choose_device,
    forward_flops,
    measure,
    random_network,
)

Piece = Callable[[Config, argparse.Namespace], Measured]


def inference_jobs(
    config: Config, sections: Sequence[str], options: argparse.Namespace
) -> list[Job]:
    """The jobs of `sections`, implementation by implementation.

    The pipelines have processes of their own: the first one's start is measured too, and the other
    one's memory counts.
    """
    lines: list[tuple[str, str, Piece, str]] = [
        ("step", "own", partial(step, kernel=options.attention), "pieces"),
        ("step", "own, flash", partial(step_by_another, kernel="flash"), "pieces"),
        ("step", "own, sdpa", partial(step_by_another, kernel="sdpa"), "pieces"),
        ("step", "own, fp8", step_with_fp8, "pieces"),
        ("decode", "own", decode, "pieces"),
        ("encode", "own", encode, "pieces"),
        ("t5", "own", embed_text, "pieces"),
        ("pipeline", "own", pipeline, "pipeline"),
    ]
    references = dict.fromkeys(INFERENCE_SECTIONS, "diffusers") | {"t5": "transformers"}
    if options.against:
        lines.append(
            ("step", "diffusers", partial(diffusers_baseline.step, compiled=False), "diffusers")
        )
        if options.compile:
            references["step"] = "diffusers, compiled"
            lines.append(
                (
                    "step",
                    references["step"],
                    partial(diffusers_baseline.step, compiled=True),
                    "diffusers",
                )
            )
        lines += [
            ("decode", "diffusers", partial(diffusers_baseline.decode, tiled=False), "diffusers"),
            (
                "decode",
                "diffusers, tiled",
                partial(diffusers_baseline.decode, tiled=True),
                "diffusers",
            ),
            ("encode", "diffusers", partial(diffusers_baseline.encode, at_once=False), "diffusers"),
            (
                "encode",
                "diffusers, one pass",
                partial(diffusers_baseline.encode, at_once=True),
                "diffusers",
            ),
            ("t5", "transformers", diffusers_baseline.embed_text, "diffusers"),
            ("pipeline", "diffusers", diffusers_baseline.pipeline, "diffusers"),
        ]
    if torch.cuda.is_available():
        in_low_memory = partial(pipeline, memory="low")
        lines.append(("pipeline", "own, memory low", in_low_memory, "low memory"))
    return [
        Job(
            section, label, partial(run, config, options), process, references.get(section) == label
        )
        for section, label, run, process in lines
        if section in sections
    ]


@torch.no_grad()
def step(
    config: Config, options: argparse.Namespace, *, kernel: str, in_fp8: bool = False
) -> Measured:
    """One batched forward of the transformer for both branches of guidance.

    Its operations are counted as if the branches shared none.
    """
    device, node = choose_device(), config.model["network_config"]
    dtype = inputs.run_dtype(config)
    check_attention(kernel, config.model, device=device, dtype=dtype)
    network = random_network(node, dtype=dtype, device=device).eval()
    network.set_attention(kernel)
    layers = network.transformer.layers
    num_weights = sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)
    if in_fp8:
        quantize_linears(network)
    if options.compile:
        network.compile_blocks()
    wrapper = NetworkWrapper(network)
    latents, texts, timestep = inputs.step_inputs(config, device)
    cond = {"crossattn": texts}
    measured = measure(
        lambda: wrapper(latents, timestep, cond),
        device=device,
        **inputs.step_repeats(options, device),
    )
    flops = forward_flops(
        num_weights,
        num_tokens=texts.shape[1] + math.prod((latents.shape[1], *network.grid_size)),
        num_layers=len(layers),
        width=network.hidden_size,
    )
    return dataclasses.replace(measured, flops=len(texts) * flops)


@torch.no_grad()
def step_by_another(config: Config, options: argparse.Namespace, *, kernel: Kernel) -> Measured:
    """A step with this attention, where it is there and `step` takes another.

    Raises:
        DoesNotApply: it is not so.
    """
    token = torch.empty(1, dtype=inputs.run_dtype(config), device=choose_device())
    fastest, *others = list_kernels(token, head_size=head_size(config.model))
    if options.attention != "auto":
        raise DoesNotApply(f"{options.attention} alone was asked for")
    if kernel == fastest:
        raise DoesNotApply("the line before is of the same kernel")
    if kernel not in others:
        raise DoesNotApply("this kernel does not run here")
    return step(config, options, kernel=kernel)


def step_with_fp8(config: Config, options: argparse.Namespace) -> Measured:
    """A step with float8 products, on a GPU that has them.

    Raises:
        DoesNotApply: on another.
    """
    device = choose_device()
    if device.type != "cuda" or not fp8_runs_on(device):
        raise DoesNotApply("there are no float8 products here")
    return step(config, options, kernel=options.attention, in_fp8=True)


@torch.no_grad()
def decode(config: Config, options: argparse.Namespace) -> Measured:
    """Latents to frames, chunk by chunk; none is kept."""
    device, vae = _first_stage(config)
    latents = inputs.latents(config, device).transpose(1, 2).to(inputs.run_dtype(config))

    def run() -> None:
        for _ in vae.decode_streamed(latents):
            pass

    return measure(run, device=device, **inputs.repeats(options))


@torch.no_grad()
def encode(config: Config, options: argparse.Namespace) -> Measured:
    """Frames to moments."""
    device, vae = _first_stage(config)
    video = inputs.video(config, device).to(inputs.run_dtype(config))
    return measure(lambda: encode_moments(vae, video), device=device, **inputs.repeats(options))


def _first_stage(config: Config) -> tuple[torch.device, torch.nn.Module]:
    """The autoencoder with random weights, and where it is."""
    device, node = choose_device(), copy.deepcopy(config.model["first_stage_config"])
    node["params"]["ckpt_path"] = None
    with device:
        return device, build_first_stage(node, dtype=inputs.run_dtype(config), device=device)


def embed_text(config: Config, options: argparse.Namespace) -> Measured:
    """A prompt through the text encoder."""
    device = choose_device()
    conditioner = instantiate_from_config(
        config.model["conditioner_config"], dtype=inputs.run_dtype(config), device=device
    ).eval()
    return measure(
        lambda: conditioner.encode([inputs.PROMPT]), device=device, **inputs.repeats(options)
    )


def pipeline(config: Config, options: argparse.Namespace, *, memory: str = "high") -> Measured:
    """A prompt to frames of 8 bits on the host, as sample_video.py makes them."""
    config = copy.deepcopy(config)
    config.args.memory = memory
    config.args.attention = options.attention
    config.args.compile = options.compile
    with no_garbage_collection():
        pipe = CogVideoX.load(config, check_sampling(config))
    ready_at = time.time()
    # Each a text of its own, since the pipeline keeps the embedding of the last one.
    prompts = (f"{inputs.PROMPT} {number}" for number in itertools.count())
    times = inputs.repeats(options, steps=1)
    for _ in range(times["warmup"]):
        pipe(next(prompts), num_steps=inputs.WARMUP_STEPS)
    measured = measure(
        lambda: pipe(next(prompts)), device=pipe.engine.device, warmup=0, steps=times["steps"]
    )
    return dataclasses.replace(measured, ready_at=ready_at)
