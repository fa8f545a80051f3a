"""Measure how much time and GPU memory a configuration takes, part by part or as a whole.

    python tools/benchmark.py --base configs/cogvideox_2b_infer.yaml --against diffusers
    python tools/benchmark.py --base configs/cogvideox_2b_sft.yaml --only train --against diffusers

If the configuration has a section `deepspeed`, `train` is measured; otherwise, the other sections:

    step      one sampling step with guidance: one batched forward pass of the transformer
    decode    decode latents to video frames
    encode    encode video frames to moments
    t5        embed a prompt
    pipeline  turn a prompt into a video: T5, all sampling steps, decoding
    train     one training step: the objective, DeepSpeed's engine and the optimizer

If the weights of the configuration are missing, or if `--weights` names a folder that does not
exist, random weights are written and used. Time and memory do not depend on weight values, except
for attention on Hopper GPUs: a wider spread of attention scores raises the fallback ratio.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from arguments import parse_config
from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.config import Config, SamplingArgs, TrainingArgs
from sgm.errors import UserError
from sgm.files import installed_versions, new_folder, replacing
from sgm.preflight import check_model_section, find_weights, latent_shape
from tools.bench.jobs import (
    INFERENCE_SECTIONS,
    METHODS,
    SECTIONS,
    BenchmarkResult,
    Job,
    new_process,
    run_jobs,
)
from tools.bench.measuring import run_dtype, t5_params

GB = 1e9
_WITH_WEIGHTS = {"pipeline", "t5"}  # the sections that read weight files


def choose_sections(config: Config, asked: str | None) -> list[str]:
    """Return the sections to measure: those in `asked` (``--only``), or all that fit `config`.

    Raises:
        UserError: a section is unknown or does not fit the configuration.
    """
    possible = ("train",) if config.deepspeed else INFERENCE_SECTIONS
    names = asked.split(",") if asked else possible
    for name in names:
        if name not in possible:
            raise UserError(
                f"--only {name} does not fit a configuration with"
                f"{'' if config.deepspeed else 'out'} a section deepspeed; choose from "
                f"{', '.join(possible)}"
            )
    return [section for section in possible if section in names]


def check_options(options: argparse.Namespace, config: Config) -> None:
    """Check the options before anything is loaded.

    Raises:
        UserError: an option is invalid, or the configuration lacks a section that is needed.
    """
    trains = bool(config.deepspeed)
    if any(n is not None and n < 1 for n in (options.steps, options.warmup, options.rank)):
        raise UserError("--steps, --warmup and --rank must be at least 1")
    if trains and options.attention == "hopper":
        raise UserError("--attention hopper supports only sampling; use flash or sdpa for training")
    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise UserError(
            f"--json {options.json} cannot be written; name a file in an existing folder"
        )
    packages = ["diffusers", "peft"] if trains else ["diffusers"]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if options.against and missing:
        raise UserError(
            f"--against {options.against} needs {' and '.join(missing)}; install with pip"
        )
    for node in () if trains else ("conditioner_config", "first_stage_config", "sampler_config"):
        if not config.model.get(node):
            raise UserError(f"model.{node} is missing in the configuration; sampling needs it")


@contextmanager
def config_with_weights(config: Config, folder: Path | None) -> Iterator[Config]:
    """Yield the configuration with paths of weights that exist.

    Args:
        config: the configuration as its files define it.
        folder: use the weights in this folder instead of those of `config`. If the folder does not
            exist, random weights are written to it. None: use the weights of `config`, or random
            weights in a temporary folder if they are missing.

    Raises:
        UserError: the folder cannot be written.
    """
    if folder is None and _has_weights(config):
        yield config
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary) / "weights"
        if not folder.exists():
            print(f"writing random weights to {folder} …", file=sys.stderr, flush=True)
            with new_folder(folder) as partial_folder:
                _write_apart(config, partial_folder)
        changed = copy.deepcopy(config)
        paths = _paths_in(folder)
        changed.args.load = str(paths["load"])
        changed.model["first_stage_config"]["params"]["ckpt_path"] = str(paths["vae"])
        t5_params(changed)["model_dir"] = str(paths["t5"])
        yield changed


def _has_weights(config: Config) -> bool:
    """Return whether all weights of a configuration exist; print what is missing."""
    try:
        find_weights(config.model, config.args.load)
    except UserError as error:
        print(f"using random weights, because {error}", file=sys.stderr)
        return False
    return True


def _paths_in(folder: Path) -> dict[str, Path]:
    return {
        "load": folder / "transformer",
        "vae": folder / "vae" / "3d-vae.pt",
        "t5": folder / "t5",
    }


def _write_apart(config: Config, folder: Path) -> None:
    """Write random weights in a separate process, so that no GPU memory stays allocated."""
    from tools.make_random_weights import write_weights

    paths, dtype = _paths_in(folder), run_dtype(config)
    with new_process() as process:
        process.submit(write_weights, config.model, **paths, t5_dtype=dtype).result()


def report(
    jobs: Sequence[Job], json_file: Path | None, *, head: Mapping[str, Any]
) -> list[BenchmarkResult]:
    """Run all jobs, print each result when it is finished, and return all of them.

    Args:
        jobs: the jobs, in the order in which they run.
        json_file: a file to write too, after each job: the keys of `head`, then a list `results`.
        head: the command line, its configuration files and the package versions.

    Raises:
        UserError: the file cannot be written.
    """
    results: list[BenchmarkResult] = []
    for result in run_jobs(jobs):
        results.append(result)
        print(_line(result, None), file=sys.stderr, flush=True)
        if json_file:
            content = {**head, "results": [dataclasses.asdict(one) for one in results]}
            with replacing(json_file) as partial_file:
                partial_file.write_text(json.dumps(content, indent=1), "utf-8")
    return results


def print_table(results: Sequence[BenchmarkResult]) -> None:
    """Print a line for each result, with its time relative to the reference of its section."""
    print(
        f"{'section':9} {'implementation':40} {'seconds':>8} {'+-':>5} {'samples/s':>9} "
        f"{'peak GB':>8} {'of peak':>8} {'time':>7}"
    )
    references = {one.section: one.seconds for one in results if one.is_reference}
    for result in sorted(results, key=lambda one: SECTIONS.index(one.section)):
        print(_line(result, references.get(result.section)))
    for result in results:
        if result.startup_seconds:
            print(
                f"{result.section}, {result.label}: "
                f"ready {result.startup_seconds:.1f} s after the start of the process"
            )


def _line(result: BenchmarkResult, reference: float | None) -> str:
    start = f"{result.section:9} {result.label:40}"
    if result.failure:
        return f"{start} failed: {result.failure}"
    memory = f"{result.peak_memory / GB:.2f}" if result.peak_memory else "-"
    share = f"{result.peak_share:.1%}" if result.peak_share else "-"
    ratio = f"{result.seconds / reference:.3f}x" if reference else "-"
    return (
        f"{start} {result.seconds:8.3f} {result.spread:5.1%} {result.samples_per_second:9.3f} "
        f"{memory:>8} {share:>8} {ratio:>7}"
    )


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", nargs="+", required=True, help="YAML files, merged in order")
    parser.add_argument(
        "--only",
        metavar="SECTION,…",
        help="what to measure; default: all sections that fit the configuration",
    )
    parser.add_argument("--against", choices=("diffusers",), help="also measure a baseline")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on GPU")
    parser.add_argument(
        "--attention",
        choices=("auto", "hopper", "flash", "sdpa"),
        help="attention kernel; default: args.attention of the configuration",
    )
    parser.add_argument(
        "--warmup", type=int, help="warm-up runs; default: 1, or 5 for step and train on a GPU"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="measured runs; default: 3, or 1 for pipeline, or 10 for step and train on a GPU",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="folder of the weights; if it does not exist, random weights are written to it",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    training.add_argument("--rank", type=int, default=128, help="LoRA rank; default: 128")
    training.add_argument(
        "--keep",
        nargs="+",
        choices=("block", "attention", "all"),
        default=("attention",),
        help="activation checkpointing policies to measure; default: attention",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code, which is 1 if a measurement failed."""
    argv = sys.argv[1:] if argv is None else argv
    options = build_parser().parse_args(argv)
    set_up_logging()
    files = ["--base", *options.base]
    config = parse_config(SamplingArgs, "", files)
    if config.deepspeed:
        config = parse_config(TrainingArgs, "", files)
    sections = choose_sections(config, options.only)
    check_model_section(config.model)
    options.attention = options.attention or config.args.attention
    if options.compile is None:
        options.compile = torch.cuda.is_available()
    check_options(options, config)
    versions = installed_versions(("torch", "triton", "flash-attn-4", "diffusers"))
    head = {"argv": list(argv), "base": options.base, "versions": versions}
    if config.deepspeed:
        from tools.bench.training import training_jobs  # imports DeepSpeed

        results = report(training_jobs(config, options), options.json, head=head)
    else:
        from tools.bench.inference import inference_jobs

        latent_shape(config.args, config.model)
        needs = _WITH_WEIGHTS & set(sections)
        with config_with_weights(config, options.weights) if needs else nullcontext(config) as used:
            results = report(inference_jobs(used, sections, options), options.json, head=head)
    print_table(results)
    return 1 if any(result.failure for result in results) else 0


if __name__ == "__main__":
    run_and_exit(main)
