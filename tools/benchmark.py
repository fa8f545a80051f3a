"""Measure time and memory of a configuration, piece by piece or as a whole.

    python tools/benchmark.py --base configs/cogvideox_2b_infer.yaml --against diffusers
    python tools/benchmark.py --base configs/cogvideox_2b_sft.yaml --only train --against diffusers

A configuration with a section `deepspeed` is for training, one without it for making videos:

    step      one sampling step with guidance: a batched forward of the transformer
    decode    latents to the frames of a video
    encode    the frames of a video to moments
    t5        a prompt to its embedding
    pipeline  a prompt to a video: T5, all steps of the sampler, decoding
    train     a training step: the objective, DeepSpeed's engine and the optimizer

If the weights of the configuration are missing, or if `--weights` names a new folder, random
weights are written and read. Time and memory do not depend on the values of weights, except for
attention on Hopper GPUs: the wider its scores are spread, the higher is the fallback ratio.
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
_WITH_WEIGHTS = {"pipeline", "t5"}  # the sections that read files


def choose_sections(config: Config, asked: str | None) -> list[str]:
    """The sections to measure: those of ``--only``, or all that the configuration is for.

    Raises:
        UserError: a section is unknown, or the configuration is not for it.
    """
    possible = ("train",) if config.deepspeed else INFERENCE_SECTIONS
    names = asked.split(",") if asked else possible
    for name in names:
        if name not in possible:
            raise UserError(
                f"--only {name}: a configuration with{'' if config.deepspeed else 'out'} a section "
                f"deepspeed is for {', '.join(possible)}"
            )
    return [section for section in possible if section in names]


def check_options(options: argparse.Namespace, config: Config) -> None:
    """Check the options before anything is loaded.

    Raises:
        UserError: an option cannot be used, or the configuration lacks a part that is measured.
    """
    trains = bool(config.deepspeed)
    if any(n is not None and n < 1 for n in (options.steps, options.warmup, options.rank)):
        raise UserError("--steps, --warmup and --rank must be at least 1")
    if trains and options.attention == "hopper":
        raise UserError("--attention hopper is for sampling; for training take flash or sdpa")
    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise UserError(f"--json {options.json}: name a file in a folder that exists")
    packages = ["diffusers", "peft"] if trains else ["diffusers"]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if options.against and missing:
        raise UserError(
            f"--against {options.against} needs {' and '.join(missing)}; pip install them"
        )
    for node in () if trains else ("conditioner_config", "first_stage_config", "sampler_config"):
        if not config.model.get(node):
            raise UserError(f"model.{node} is missing; a configuration that samples has it")


@contextmanager
def config_with_weights(config: Config, folder: Path | None) -> Iterator[Config]:
    """The configuration with paths of existing weights.

    Args:
        config: as the files give it.
        folder: weights to use in place of those of `config`. If it does not exist, random ones are
            written to it. None: those of `config`, or random ones in a temporary folder.

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
    """Whether all weights of a configuration exist; prints what is missing."""
    try:
        find_weights(config.model, config.args.load)
    except UserError as error:
        print(f"random weights, since {error}", file=sys.stderr)
        return False
    return True


def _paths_in(folder: Path) -> dict[str, Path]:
    return {
        "load": folder / "transformer",
        "vae": folder / "vae" / "3d-vae.pt",
        "t5": folder / "t5",
    }


def _write_apart(config: Config, folder: Path) -> None:
    """Write random weights in a process of its own, which leaves nothing on the GPU."""
    from tools.make_random_weights import write_weights

    paths, dtype = _paths_in(folder), run_dtype(config)
    with new_process() as process:
        process.submit(write_weights, config.model, **paths, t5_dtype=dtype).result()


def report(
    jobs: Sequence[Job], json_file: Path | None, *, head: Mapping[str, Any]
) -> list[BenchmarkResult]:
    """Run all jobs, print each result when it is finished, and return all of them.

    Args:
        jobs: the jobs.
        json_file: the results are written to it too, as a list `results` after the keys of `head`.
        head: the command line, its configurations and the versions of packages.

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
    """Print a line for each result, compared with the reference of its section."""
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
    """The command line."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", nargs="+", required=True, help="configurations, merged in order")
    parser.add_argument(
        "--only",
        metavar="SECTION,…",
        help="what to measure; default: all that the configuration is for",
    )
    parser.add_argument("--against", choices=("diffusers",), help="measure a baseline too")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    parser.add_argument(
        "--attention",
        choices=("auto", "hopper", "flash", "sdpa"),
        help="kernel of attention; default: args.attention of the configuration",
    )
    parser.add_argument(
        "--warmup", type=int, help="runs before the measured ones: 1; step and train on a GPU: 5"
    )
    parser.add_argument(
        "--steps", type=int, help="measured runs: 3; pipeline: 1; step and train on a GPU: 10"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to it too")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="folder of the weights; if new, random ones are written",
    )
    training = parser.add_argument_group("of training")
    training.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    training.add_argument("--rank", type=int, default=128, help="rank of LoRA; default: 128")
    training.add_argument(
        "--keep",
        nargs="+",
        choices=("block", "attention", "all"),
        default=("attention",),
        help="activation checkpointing policies to measure; default: attention",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, report; returns the exit code: 1 if a line failed."""
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
