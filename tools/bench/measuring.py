"""Workloads, timing, FLOP counts and random weights, for all lines of the benchmark."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sgm.config import Config
from sgm.preflight import TEMPORAL_FACTOR, latent_shape
from sgm.util import instantiate_from_config

PROMPT = "a red circle moving left"
WARMUP_STEPS = 2  # sampling steps of a warm-up video; enough to compile all code
# Dense bf16 rates in TFLOP/s, from NVIDIA's data sheets. Each key is part of a device name.
PEAK_TFLOPS = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "A100": 312, "B200": 2250}


@dataclass(frozen=True)
class Measured:
    """Time and memory of a call.

    Args:
        seconds: median of the repetitions.
        peak_memory: peak bytes on the GPU over all repetitions, with weights; 0 on a CPU.
        spread: half the difference between the slowest and the fastest repetition, as a fraction
            of `seconds`.
        flops: FLOPs of the model in one call; None if they are not counted.
        ready_at: `time.time()` when everything was loaded; None if it is not measured.
    """

    seconds: float
    peak_memory: int
    spread: float = 0.0
    flops: float | None = None
    ready_at: float | None = None


def choose_device() -> torch.device:
    """Return the first GPU, or the CPU if there is no GPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def peak_rate(device_name: str) -> float | None:
    """Return the dense bf16 rate in FLOP/s of the named device; None if it is unknown."""
    rates = [rate * 1e12 for words, rate in PEAK_TFLOPS.items() if words in device_name]
    return rates[0] if rates else None


def forward_flops(linear_weights: int, *, num_tokens: int, num_layers: int, width: int) -> float:
    """Return the FLOPs of a forward pass of all blocks for one sample; a multiply-add counts as 2.

    Args:
        linear_weights: number of weights in the linear layers of all blocks.
        num_tokens: number of text and video tokens together.
        num_layers: number of blocks.
        width: size of a token; determines the cost of the attention's two matrix products.
    """
    return 2.0 * linear_weights * num_tokens + 4.0 * num_layers * width * num_tokens**2


def fill_random(name: str, weight: Tensor) -> None:
    """Fill a weight in place: matrices with random values, scales with ones, shifts with zeros."""
    if weight.ndim > 1:
        weight.normal_(std=0.02)
    else:
        weight.fill_(float(name.endswith("weight")))


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Fill all parameters of a module with `fill_random`."""
    for name, weight in module.named_parameters():
        fill_random(name, weight)


def random_network(
    node: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Build the transformer of a configuration node, with random weights and its LoRA layers."""
    with torch.device("meta"):
        network = instantiate_from_config(node)
    network.to(dtype).to_empty(device=device)
    randomize(network)
    network.add_lora()
    return network


def run_dtype(config: Config) -> torch.dtype:
    """Return the precision of a run."""
    return getattr(torch, config.args.precision)


def t5_params(config: Config) -> dict[str, Any]:
    """Return the params of the T5 embedder in `config`; changing them changes `config`."""
    return config.model["conditioner_config"]["params"]["emb_models"][0]["params"]


@dataclass(frozen=True)
class Workload:
    """The work that all implementations of a section do. It is picklable.

    Args:
        config: determines the sizes and the precision.
        options: the parsed command line; its ``warmup`` and ``steps`` override the defaults of
            `measure`.
    """

    config: Config
    options: argparse.Namespace

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return choose_device()

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the run."""
        return run_dtype(self.config)

    def measure(
        self,
        call: Callable[[], object],
        *,
        warmup: int = 1,
        steps: int = 3,
        warmup_call: Callable[[], object] | None = None,
    ) -> Measured:
        """Measure the median time and the peak memory of `call`.

        Args:
            call: the work.
            warmup, steps: default number of calls before and during the measurement.
            warmup_call: called instead of `call` before the measurement.
        """
        for _ in range(self.options.warmup or warmup):
            (warmup_call or call)()
        on_gpu = self.device.type == "cuda"
        if on_gpu:  # do not count the memory that compiling and tuning took
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = (_gpu_clock if on_gpu else _cpu_clock)(call, self.options.steps or steps)
        seconds = statistics.median(times)
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        return Measured(seconds, peak, spread=(max(times) - min(times)) / 2 / seconds)

    def measure_step(self, call: Callable[[], object]) -> Measured:
        """Measure a step of a loop. A GPU needs more calls, since it settles at its power limit."""
        on_gpu = self.device.type == "cuda"
        return self.measure(call, warmup=5, steps=10) if on_gpu else self.measure(call)

    def measure_videos(self, make: Callable[[int], object]) -> Measured:
        """Measure ``make(num_steps)``, which makes a whole video."""
        num_steps = self.config.model["sampler_config"]["params"]["num_steps"]
        return self.measure(
            lambda: make(num_steps), steps=1, warmup_call=lambda: make(WARMUP_STEPS)
        )

    def video_shape(self) -> tuple[int, ...]:
        """Return the shape (1, t, 3, h, w) of the video that the configuration makes."""
        num_latent_frames = latent_shape(self.config.args, self.config.model)[0]
        params = self.config.model["network_config"]["params"]
        factor = params.get("time_compressed_rate", TEMPORAL_FACTOR)
        num_frames = factor * (num_latent_frames - 1) + 1
        return (1, num_frames, 3, *self.config.args.sampling_image_size)

    def video(self) -> Tensor:
        """Return a random video (1, t, 3, h, w) in [-1, 1]."""
        return torch.rand(self.video_shape(), device=self.device) * 2 - 1

    def latents(self) -> Tensor:
        """Return latents (1, t, c, h, w) from the standard normal distribution."""
        shape = latent_shape(self.config.args, self.config.model)
        return torch.randn(1, *shape, device=self.device)

    def text_shape(self) -> tuple[int, int]:
        """Return the shape (n, d) of a text embedding."""
        modules = self.config.model["network_config"]["params"]["modules"]
        return (
            modules["pos_embed_config"]["params"]["text_length"],
            modules["patch_embed_config"]["params"]["text_hidden_size"],
        )

    def step_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return latents (1, t, c, h, w), texts (2, n, d) and timestep (1,) for a guided step."""
        texts = torch.randn(2, *self.text_shape(), device=self.device)
        return self.latents(), texts, torch.tensor([500], device=self.device)

    def training_inputs(self) -> tuple[Tensor, Tensor]:
        """Return latents (1, t, c, h, w) in float32 and a text embedding (1, n, d) in bf16."""
        params = self.config.model["network_config"]["params"]
        num_frames = (params["num_frames"] - 1) // params["time_compressed_rate"] + 1
        shape = (params["in_channels"], params["latent_height"], params["latent_width"])
        latents = torch.randn(1, num_frames, *shape, device=self.device)
        context = torch.randn(1, *self.text_shape(), device=self.device)
        return latents, context.to(torch.bfloat16)


def _cpu_clock(call: Callable[[], object], times: int) -> list[float]:
    """Call `call` `times` times and return the seconds of each call."""
    marks = [time.perf_counter()]
    for _ in range(times):
        call()
        marks.append(time.perf_counter())
    return [end - start for start, end in pairwise(marks)]


def _gpu_clock(call: Callable[[], object], times: int) -> list[float]:
    """Return the seconds of each call by the GPU's clock, without synchronizing between calls."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(marks)]
