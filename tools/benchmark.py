"""Time and memory of a configuration, piece by piece or as a whole, with random or real weights.

    python tools/benchmark.py --base configs/cogvideox_2b_infer.yaml --against diffusers
    python tools/benchmark.py --base configs/cogvideox_2b_sft.yaml --only train --against diffusers

A configuration with a section `deepspeed` trains, one without makes videos:

    step      one sampling step with guidance: a batched forward of the transformer
    decode    latents to the frames of a video
    encode    the frames of a video to moments
    t5        a prompt to its embedding
    pipeline  a prompt to a video: T5, all steps of the sampler, decoding
    train     a training step: the objective, DeepSpeed's engine and the optimizer

Where the files that a configuration names are not there, or `--weights` says so, random weights are
written and read. Time and memory do not depend on their values, but for attention on Hopper GPUs:
the wider its scores are spread, the more of it is computed twice.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import parse_config
from sgm.cli import CommandParser, run_and_exit, set_up_logging
from sgm.config import Config, SamplingArgs, TrainingArgs
from sgm.errors import UserError, nearest_name
from sgm.files import installed_versions, new_folder, replacing
from sgm.preflight import check_model_section, find_weights, latent_shape
from tools.bench.inputs import run_dtype, t5_params
from tools.bench.jobs import INFERENCE_SECTIONS, METHODS, SECTIONS, Job, Result, run_jobs

GB = 1e9
_WITH_WEIGHTS = ("pipeline", "t5")  # the sections that read files
_TRAINING = {"methods": METHODS, "rank": 128, "keep": ("attention",)}  # defaults of its flags


def sections_of(text: str) -> list[str]:
    """Sections of a list with commas, in their usual order.

    Raises:
        argparse.ArgumentTypeError: one is unknown.
    """
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(
                f"unknown section {name!r}; {nearest_name(name, SECTIONS)}"
            )
    return [section for section in SECTIONS if section in names]


def choose_sections(config: Config, asked: Sequence[str] | None) -> list[str]:
    """What to measure of a configuration: all that it can do, or what is asked for.

    Raises:
        UserError: something is asked for that this configuration is not for.
    """
    trains = bool(config.deepspeed)
    possible = ("train",) if trains else INFERENCE_SECTIONS
    for section in asked or ():
        if section not in possible:
            raise UserError(
                f"--only {section}: the configuration has {'a' if trains else 'no'} section "
                f"deepspeed, so that it is for {', '.join(possible)}"
            )
    return list(asked or possible)


def check_packages(options: argparse.Namespace, sections: Sequence[str]) -> None:
    """Raise UserError unless the packages that the options need are installed."""
    if options.against:
        packages = ["diffusers", "peft"] if "train" in sections else ["diffusers"]
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"--against {options.against} needs {' and '.join(missing)}; pip install them"
            )
    if options.attention != "flash":
        return
    from sgm.modules.transformer.attention import flash_is_installed  # imports PyTorch

    if not flash_is_installed():
        raise UserError(
            'attention: flash needs FlashAttention-4; pip install --pre "flash-attn-4[cu13]"'
        )


def check_flags(options: argparse.Namespace, sections: Sequence[str]) -> None:
    """Refuse flags that nothing would read, and fill in the training's where they are absent.

    Raises:
        UserError: a number below 1, a flag or kernel that is not for these sections, or a result
            that could not be written.
    """
    names = ", ".join(sections)
    for name, default in _TRAINING.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif "train" not in sections:
            raise UserError(f"--{name} is for train, but only {names} would be measured")
    if any(n is not None and n < 1 for n in (options.steps, options.warmup, options.rank)):
        raise UserError("--steps, --warmup and --rank must be at least 1")
    if options.attention == "hopper" and "train" in sections:
        raise UserError("--attention hopper is for sampling; for training take flash or sdpa")
    if options.weights and not any(section in _WITH_WEIGHTS for section in sections):
        raise UserError(
            f"--weights is for {' and '.join(_WITH_WEIGHTS)}, but only {names} would be measured"
        )
    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise UserError(f"--json {options.json}: name a file in a folder that exists")


@contextmanager
def config_with_weights(config: Config, folder: Path | None) -> Iterator[Config]:
    """The configuration with paths of weights that are there.

    Args:
        config: as the files say it.
        folder: weights in place of those that `config` names; random ones are written to it, if
            it does not exist. None: those of `config`, or random ones in a folder that is removed
            afterwards.

    Raises:
        UserError: the folder cannot be written, or holds something else.
    """
    with ExitStack() as stack:
        if folder is None:
            lacking = _lacking(config)
            if lacking is None:
                yield config
                return
            print(f"random weights, since {lacking}", file=sys.stderr)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "weights"
        if not folder.exists():
            print(f"writing random weights to {folder} …", file=sys.stderr, flush=True)
            with new_folder(folder) as partial_folder:
                _write_apart(config, partial_folder)
        changed = copy.deepcopy(config)
        paths = _paths_in(folder)
        changed.args.load = str(paths["load"])
        changed.model["first_stage_config"]["params"]["ckpt_path"] = str(paths["vae"])
        t5_params(changed)["model_dir"] = str(paths["t5"])
        lacking = _lacking(changed)
        if lacking:
            raise UserError(
                f"--weights {folder} does not hold weights that this tool wrote: "
                f"{lacking.partition(';')[0]}; name a new folder"
            )
        yield changed


def _lacking(config: Config) -> str | None:
    """Which of the weights that a configuration names are not there."""
    try:
        find_weights(config.model, config.args.load)
    except UserError as error:
        return str(error)
    return None


def _paths_in(folder: Path) -> dict[str, Path]:
    return {
        "load": folder / "transformer",
        "vae": folder / "vae" / "3d-vae.pt",
        "t5": folder / "t5",
    }


def _write_apart(config: Config, folder: Path) -> None:
    """Random weights, from a process of its own, which leaves nothing on the GPU."""
    from tools.make_random_weights import write_weights

    paths = _paths_in(folder)
    write = partial(write_weights, config.model, **paths, t5_dtype=run_dtype(config))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=set_up_logging) as pool:
        pool.submit(write).result()


def circumstances(argv: Sequence[str], files: Sequence[str]) -> dict[str, Any]:
    """What results are to be read with: the command line, its configurations, the versions."""
    versions = installed_versions(("torch", "triton", "flash-attn-4", "diffusers"))
    return {"argv": list(argv), "base": list(files), "versions": versions}


def report(jobs: Sequence[Job], json_file: Path | None, *, head: Mapping[str, Any]) -> list[Result]:
    """Run all jobs; every result is told as soon as it is there.

    With a `json_file` it is written there too, in a list `results` after what `head` holds.
    """
    results: list[Result] = []
    for result in run_jobs(jobs):
        results.append(result)
        print(_line(result, None), file=sys.stderr, flush=True)
        if json_file:
            told = {**head, "results": [dataclasses.asdict(one) for one in results]}
            with replacing(json_file) as partial_file:
                partial_file.write_text(json.dumps(told, indent=1), "utf-8")
    return results


def print_table(results: Sequence[Result]) -> None:
    """One line for each result, compared with the reference of its section."""
    print(
        f"{'section':9} {'implementation':40} {'seconds':>8} {'+-':>5} {'samples/s':>9} "
        f"{'peak GB':>8} {'of peak':>8} {'time':>7}"
    )
    references = {one.section: one.seconds for one in results if one.is_reference}
    results = sorted(results, key=lambda one: SECTIONS.index(one.section))
    for result in results:
        print(_line(result, references.get(result.section)))
    for result in results:
        if result.startup_seconds:
            print(
                f"{result.section}, {result.label}: "
                f"ready {result.startup_seconds:.1f} s after the start of the process"
            )


def _line(result: Result, reference: float | None) -> str:
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
        type=sections_of,
        metavar="SECTION,…",
        help="what to measure; default: all that the configuration is for",
    )
    parser.add_argument("--against", choices=("diffusers",), help="measure another code beside it")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    parser.add_argument(
        "--attention",
        choices=("auto", "hopper", "flash", "sdpa"),
        help="kernel of attention; default: args.attention of the configuration",
    )
    parser.add_argument(
        "--warmup", type=int, help="runs before the measured: 1; train: 3; a step on a GPU: 5"
    )
    parser.add_argument(
        "--steps", type=int, help="measured runs: 3; pipeline: 1; train, and a step on a GPU: 10"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--weights", type=Path, metavar="DIR", help="read weights there; random ones if it is new"
    )
    training = parser.add_argument_group("of training")
    training.add_argument("--methods", nargs="*", choices=METHODS, help="default: all")
    training.add_argument("--rank", type=int, help="rank of LoRA; default: 128")
    training.add_argument(
        "--keep",
        nargs="+",
        choices=("block", "attention", "all"),
        help="what activation checkpointing keeps of each block; default: attention",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, report; 1 if a line failed."""
    argv = sys.argv[1:] if argv is None else argv
    options = build_parser().parse_args(argv)
    set_up_logging()
    files = ["--base", *options.base]
    config = parse_config(SamplingArgs, "", files)
    sections = choose_sections(config, options.only)
    if sections == ["train"]:
        config = parse_config(TrainingArgs, "", files)
    options.attention = options.attention or config.args.attention
    check_flags(options, sections)
    check_packages(options, sections)
    head = circumstances(argv, options.base)
    if options.compile is None:
        import torch

        options.compile = torch.cuda.is_available()
    check_model_section(config.model)
    if sections == ["train"]:
        from tools.bench.training import training_jobs  # imports DeepSpeed

        results = report(training_jobs(config, options), options.json, head=head)
    else:
        from tools.bench.inference import inference_jobs

        latent_shape(config.args, config.model)
        for node in ("conditioner_config", "first_stage_config", "sampler_config"):
            if not config.model.get(node):
                raise UserError(f"model.{node} is absent; a configuration that samples has it")
        needs = any(section in _WITH_WEIGHTS for section in sections)
        with config_with_weights(config, options.weights) if needs else nullcontext(config) as used:
            results = report(inference_jobs(used, sections, options), options.json, head=head)
    print_table(results)
    return 1 if any(result.failure for result in results) else 0


if __name__ == "__main__":
    run_and_exit(main)
