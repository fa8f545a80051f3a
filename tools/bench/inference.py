"""The sampling jobs: this project's implementations, and the list of all lines to measure.

Each part is built without the others, so that its peak memory does not include them. `pipeline`
measures the whole pipeline of sample_video.py, which reads weight files.
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
from tools.bench import diffusers_baseline as baseline
from tools.bench.jobs import Job
from tools.bench.measuring import PROMPT, Measured, Workload, forward_flops, random_network

Piece = Callable[[Workload], Measured | None]


def inference_jobs(
    config: Config, sections: Sequence[str], options: argparse.Namespace
) -> list[Job]:
    """Return the jobs of `sections`, grouped by implementation.

    Each pipeline of this project has its own process, because its start-up is measured too and its
    memory must not include that of another pipeline.
    """
    lines: list[tuple[str, str, Piece, str]] = [
        ("step", "own", step, "pieces"),
        ("step", "own, flash", partial(step, other="flash"), "pieces"),
        ("step", "own, sdpa", partial(step, other="sdpa"), "pieces"),
        ("step", "own, fp8", partial(step, in_fp8=True), "pieces"),
        ("decode", "own", decode, "pieces"),
        ("encode", "own", encode, "pieces"),
        ("t5", "own", embed_text, "pieces"),
        ("pipeline", "own", pipeline, "pipeline"),
    ]
    references = {"t5": "transformers"}  # in all other sections: "diffusers"
    if options.against:
        one_pass = partial(baseline.encode, at_once=True)
        lines += [
            ("step", "diffusers", baseline.step, "diffusers"),
            ("decode", "diffusers", baseline.decode, "diffusers"),
            ("decode", "diffusers, tiled", partial(baseline.decode, tiled=True), "diffusers"),
            ("encode", "diffusers", baseline.encode, "diffusers"),
            ("encode", "diffusers, one pass", one_pass, "diffusers"),
            ("t5", "transformers", baseline.embed_text, "diffusers"),
            ("pipeline", "diffusers", baseline.pipeline, "diffusers"),
        ]
        if options.compile:
            references["step"] = label = "diffusers, compiled"
            lines.append(("step", label, partial(baseline.step, compiled=True), "diffusers"))
    if torch.cuda.is_available():
        in_low_memory = partial(pipeline, memory="low")
        lines.append(("pipeline", "own, memory low", in_low_memory, "low memory"))
    work = Workload(config, options)
    return [
        Job(
            section,
            label,
            partial(run, work),
            process,
            is_reference=label == references.get(section, "diffusers"),
        )
        for section, label, run, process in lines
        if section in sections
    ]


@torch.no_grad()
def step(work: Workload, *, other: Kernel | None = None, in_fp8: bool = False) -> Measured | None:
    """Measure one batched forward pass of the transformer, for both branches of guidance.

    Args:
        work: the sizes; its options choose the attention kernel.
        other: an attention kernel to use instead of the fastest one.
        in_fp8: compute the matrix products of the MLPs in float8.

    Returns:
        The measurement. FLOPs are counted as if the two branches shared no computation. None with
        `in_fp8` if the device has no float8 products. None with `other` if this kernel does not run
        on the device or is the fastest one, or if the options choose a kernel.
    """
    device, dtype, kernel = work.device, work.dtype, work.options.attention
    if in_fp8 and not (device.type == "cuda" and fp8_runs_on(device)):
        return None
    if other:
        token = torch.empty(1, dtype=dtype, device=device)
        others = list_kernels(token, head_size=head_size(work.config.model))[1:]
        if kernel != "auto" or other not in others:
            return None
    check_attention(kernel, work.config.model, device=device, dtype=dtype)
    network = random_network(work.config.model["network_config"], dtype=dtype, device=device).eval()
    network.set_attention(other or kernel)
    layers = network.transformer.layers
    num_weights = sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)
    if in_fp8:
        quantize_linears(network)
    if work.options.compile:
        network.compile_blocks()
    wrapper = NetworkWrapper(network)
    latents, texts, timestep = work.step_inputs()
    measured = work.measure_step(lambda: wrapper(latents, timestep, {"crossattn": texts}))
    flops = forward_flops(
        num_weights,
        num_tokens=texts.shape[1] + math.prod((latents.shape[1], *network.grid_size)),
        num_layers=len(layers),
        width=network.hidden_size,
    )
    return dataclasses.replace(measured, flops=len(texts) * flops)


@torch.no_grad()
def decode(work: Workload) -> Measured:
    """Measure decoding latents to frames, chunk by chunk; the frames are discarded."""
    vae = _first_stage(work)
    latents = work.latents().transpose(1, 2).to(work.dtype)

    def run() -> None:
        for _ in vae.decode_streamed(latents):
            pass

    return work.measure(run)


@torch.no_grad()
def encode(work: Workload) -> Measured:
    """Measure encoding frames to moments."""
    vae, video = _first_stage(work), work.video().to(work.dtype)
    return work.measure(lambda: encode_moments(vae, video))


def _first_stage(work: Workload) -> torch.nn.Module:
    """Build the autoencoder with random weights."""
    node = copy.deepcopy(work.config.model["first_stage_config"])
    node["params"]["ckpt_path"] = None
    with work.device:
        return build_first_stage(node, dtype=work.dtype, device=work.device)


def embed_text(work: Workload) -> Measured:
    """Measure embedding a prompt with the text encoder."""
    node = work.config.model["conditioner_config"]
    conditioner = instantiate_from_config(node, dtype=work.dtype, device=work.device).eval()
    return work.measure(lambda: conditioner.encode([PROMPT]))


def pipeline(work: Workload, *, memory: str = "high") -> Measured:
    """Measure turning a prompt into 8-bit frames in host memory, as sample_video.py does."""
    config, options = copy.deepcopy(work.config), work.options
    config.args.memory = memory
    config.args.attention = options.attention
    config.args.compile = options.compile
    with no_garbage_collection():
        pipe = CogVideoX.load(config, check_sampling(config))
    ready_at = time.time()
    # Each video needs a new prompt, because the pipeline caches the last embedding.
    prompts = (f"{PROMPT} {number}" for number in itertools.count())
    measured = work.measure_videos(lambda num_steps: pipe(next(prompts), num_steps=num_steps))
    return dataclasses.replace(measured, ready_at=ready_at)
