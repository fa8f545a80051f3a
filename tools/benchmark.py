"""Time and memory of a configuration with random weights: no file of weights or data is read.

    python tools/benchmark.py --base configs/cogvideox_2b_sft.yaml --only train --against diffusers

Time and memory do not depend on the values of weights. Latents and text embeddings are random too,
as they come from a cache (`args.cache_dir`). Each line of the table is a training step of the
project's own: its objective, DeepSpeed's engine and the optimizer.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import Config, TrainingArgs, parse_config
from sgm.cli import CommandParser, run_command, set_up_logging
from sgm.errors import UserError
from sgm.files import replacing

METHODS = ("lora", "full", "offload")
# Dense bf16 rates in TFLOP/s by the words of a device's name, from NVIDIA's data sheets.
PEAK_TFLOPS = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "A100": 312, "B200": 2250}
GB = 1e9


@dataclass(frozen=True)
class Variant:
    """One way of training: what is trained, and how.

    `method` is one of METHODS, or "diffusers"; `keep` and `kernel` are those of the transformer.
    """

    method: str
    keep: str | None = "attention"
    compiled: bool = True
    kernel: str | None = None

    def label(self) -> str:
        """The variant in a few words."""
        if self.method not in METHODS:
            return f"{self.method}, LoRA"
        parts = [self.method, f"keep {self.keep or 'all'}", "compiled" if self.compiled else ""]
        return ", ".join(part for part in [*parts, self.kernel] if part)


@dataclass(frozen=True)
class Result:
    """What a variant took: median seconds of a step, peak memory in bytes, model FLOPs of a step.

    `peak_share` is of the device's dense bf16 rate; None where that is not known.
    """

    label: str
    device: str
    seconds: float
    samples_per_second: float
    peak_memory: int
    model_flops: float | None
    peak_share: float | None


def forward_flops(linear_weights: int, *, num_tokens: int, num_layers: int, width: int) -> float:
    """Operations of the blocks for one sample, a multiply-add counted as two.

    `linear_weights` counts the weights of all blocks that each token is multiplied with; besides
    there are queries with keys and their products with values.
    """
    return 2.0 * linear_weights * num_tokens + 4.0 * num_layers * width * num_tokens**2


def step_flops(network: Any, *, num_tokens: int) -> float:
    """Operations that a training step of one sample needs, without what is computed twice.

    The backward pass of a product costs as much again for each factor that has a gradient; every
    activation has one, and of the weights those that are trained.
    """
    weights = [weight for weight in network.transformer.layers.parameters() if weight.ndim == 2]
    width, num_layers = network.hidden_size, len(network.transformer.layers)
    frozen = sum(weight.numel() for weight in weights if not weight.requires_grad)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    attention = forward_flops(0, num_tokens=num_tokens, num_layers=num_layers, width=width)
    return 2 * num_tokens * (2.0 * frozen + 3.0 * trained) + 3 * attention


def build_network(config: Config, variant: Variant, *, rank: int, device: Any) -> Any:
    """The transformer of a configuration with random weights, set up as the variant says."""
    import torch

    from sgm.checkpoint import is_lora_matrix
    from sgm.util import instantiate_from_config

    node = copy.deepcopy(config.model["network_config"])
    modules = node["params"]["modules"]
    modules.pop("lora_config", None)
    if variant.method == "lora":
        target = "sat.model.finetune.lora2.LoraMixin"
        modules["lora_config"] = {"target": target, "params": {"r": rank}}
    with torch.device("meta"):
        network = instantiate_from_config(node)
    network.to(torch.bfloat16).to_empty(device=device)
    randomize(network)
    network.add_lora()
    if variant.method == "lora":
        for name, weight in network.named_parameters():
            weight.requires_grad_(is_lora_matrix(name))
    network.set_checkpointing(variant.keep)
    network.set_attention(variant.kernel)
    if variant.compiled:
        network.compile_blocks()
    return network


def randomize(module: Any) -> None:
    """Random matrices; vectors that scale become ones, those that shift zeros."""
    import torch

    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.02)
            else:
                weight.fill_(float("norm" in name and name.endswith("weight")))


def deepspeed_settings(config: Config, *, offload: bool) -> dict[str, Any]:
    """The `deepspeed` section in bf16 with PyTorch's fused AdamW, one sample at a time."""
    params = dict(config.deepspeed["optimizer"].get("params") or {})
    zero = dict(config.deepspeed.get("zero_optimization") or {})
    # One process has nobody to talk to meanwhile, and the CPU would wait for the GPU for it.
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


def own_step(
    config: Config, variant: Variant, *, rank: int, device: Any
) -> tuple[Callable[[Any, Any], None], float]:
    """A training step of (latents, text embedding) through the project's own path; its FLOPs."""
    from types import SimpleNamespace

    from diffusion_video import NetworkWrapper
    from sgm.training.deepspeed_engine import start_deepspeed
    from sgm.training.objective import TrainingObjective
    from sgm.util import instantiate_from_config

    network = build_network(config, variant, rank=rank, device=device)
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
    grid = network.grid_size[0] * network.grid_size[1] * network.num_latent_frames
    tokens = network.mixins["pos_embed"].text_length + grid

    def step(latents: Any, context: Any) -> None:
        loss = wrapped(latents, {"crossattn": context})
        wrapped.backward(loss)
        wrapped.step()

    return step, step_flops(network, num_tokens=tokens)


def measure(
    step: Callable[[Any, Any], None], inputs: tuple[Any, Any], *, warmup: int, steps: int
) -> tuple[float, int]:
    """Median seconds of a step, and the peak of GPU memory over all of them (0 on a CPU)."""
    import torch

    on_gpu = inputs[0].is_cuda
    seconds = []
    for _ in range(warmup + steps):
        started = time.perf_counter()
        step(*inputs)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        if on_gpu and len(seconds) == warmup:  # compiling and tuning take memory of their own
            torch.cuda.reset_peak_memory_stats()
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return statistics.median(seconds[warmup:]), peak


def random_inputs(config: Config, device: Any) -> tuple[Any, Any]:
    """Latents (1, t, c, h, w) float32 and a text embedding (1, n, d) bf16 of the model's sizes."""
    import torch

    params = config.model["network_config"]["params"]
    frames = (params["num_frames"] - 1) // params["time_compressed_rate"] + 1
    shape = (params["in_channels"], params["latent_height"], params["latent_width"])
    modules = params["modules"]
    length = modules["pos_embed_config"]["params"]["text_length"]
    width = modules["patch_embed_config"]["params"]["text_hidden_size"]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, frames, *shape, generator=generator)
    context = torch.randn(1, length, width, generator=generator)
    return latents.to(device), context.to(device, torch.bfloat16)


def peak_rate(device: Any) -> float | None:
    """The device's dense bf16 rate in FLOP/s, if it is known."""
    import torch

    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    rates = [rate for words, rate in PEAK_TFLOPS.items() if words in name]
    return rates[0] * 1e12 if rates else None


def run_variant(config: Config, variant: Variant, options: argparse.Namespace) -> Result:
    """Build and measure one variant."""
    import torch

    from sgm.modules.transformer.sat_runtime import ensure_process_groups

    set_up_logging()
    ensure_process_groups()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if variant.method in METHODS:
        step, flops = own_step(config, variant, rank=options.rank, device=device)
    else:
        from tools.rivals import diffusers_step

        step, flops = diffusers_step(config, rank=options.rank, device=device), None
    inputs = random_inputs(config, device)
    seconds, peak = measure(step, inputs, warmup=options.warmup, steps=options.steps)
    rate = peak_rate(device)
    return Result(
        label=variant.label(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        seconds=seconds,
        samples_per_second=1 / seconds,
        peak_memory=peak,
        model_flops=flops,
        peak_share=flops / seconds / rate if flops and rate else None,
    )


def run_apart(config: Config, variant: Variant, options: argparse.Namespace) -> Result:
    """`run_variant` in a process of its own, which leaves no memory behind for the next."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(run_variant, config, variant, options).result()


def print_table(results: Sequence[Result]) -> None:
    """One line for each variant."""
    reference = next((r for r in results if r.label.startswith("diffusers")), None)
    print(
        f"{'variant':44} {'s/step':>8} {'samples/s':>9} {'peak GB':>8} {'of peak':>8} {'time':>7}"
    )
    for result in results:
        share = f"{result.peak_share:.1%}" if result.peak_share else "-"
        ratio = f"{result.seconds / reference.seconds:.2f}x" if reference else "-"
        print(
            f"{result.label:44} {result.seconds:8.3f} {result.samples_per_second:9.3f} "
            f"{result.peak_memory / GB:8.2f} {share:>8} {ratio:>7}"
        )


def benchmark_train(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Training steps of all variants asked for."""
    import torch

    compiled = torch.cuda.is_available() if options.compile is None else options.compile
    variants = [
        Variant(method, None if keep == "all" else keep, compiled, options.attention)
        for method in options.methods
        for keep in options.keep
    ]
    if options.against:
        variants.append(Variant(options.against))
    results = []
    for variant in variants:
        print(f"measuring {variant.label()} …", file=sys.stderr)
        results.append(run_apart(config, variant, options))
    print_table(results)
    return {
        "torch": torch.__version__,
        "results": [dataclasses.asdict(result) for result in results],
    }


SECTIONS: dict[str, Callable[[Config, argparse.Namespace], dict[str, Any]]] = {
    "train": benchmark_train
}


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", nargs="+", required=True, help="configurations, merged in order")
    parser.add_argument("--only", choices=SECTIONS, default="train", help="what to measure")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rank", type=int, default=128, help="rank of LoRA")
    parser.add_argument(
        "--keep",
        nargs="+",
        choices=("block", "attention", "all"),
        default=["attention"],
        help="what activation checkpointing keeps of each block",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    parser.add_argument("--attention", choices=("flash", "sdpa"), help="default: the fastest")
    parser.add_argument("--against", choices=("diffusers",), help="LoRA training of another code")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measured ones")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, report."""
    options = build_parser().parse_args(argv)
    if options.steps < 1 or options.warmup < 1 or options.rank < 1:
        raise UserError("--steps, --warmup and --rank must be at least 1")
    set_up_logging()
    config = parse_config(TrainingArgs, "", ["--base", *options.base])
    report = SECTIONS[options.only](config, options)
    if options.json:
        with replacing(options.json) as partial:
            partial.write_text(json.dumps({options.only: report}, indent=1), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
