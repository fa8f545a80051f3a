"""The benchmark: its options, reports and random weights; a line of each kind on small sizes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from arguments import parse_config
from sgm.config import Config, SamplingArgs, TrainingArgs
from sgm.engine import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.loading import load_engine
from sgm.modules.diffusionmodules.sampling import SampledStep, Sampler
from tools import benchmark
from tools.bench import inference
from tools.bench.inference import inference_jobs
from tools.bench.jobs import METHODS, SECTIONS, BenchmarkResult, Job, run_job, run_jobs
from tools.bench.measuring import Measured, Workload, forward_flops
from tools.benchmark import (
    build_parser,
    choose_sections,
    config_with_weights,
    main,
    print_table,
    report,
)

CONFIGS = Path(__file__).parents[2] / "configs"
SFT, INFER = (str(CONFIGS / f"cogvideox_tiny_{name}.yaml") for name in ("sft", "infer"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file: the bundled configuration of smaller sizes, whose weights do not exist."""
    folder = tmp_path_factory.mktemp("small")
    sections = yaml.safe_load(Path(INFER).read_text())
    sections["args"] |= {
        "load": str(folder / "transformer"),
        "sampling_num_frames": 3,
        "sampling_image_size": [32, 32],
    }
    model = sections["model"]
    sizes = {"num_layers": 1, "num_frames": 9, "latent_height": 4, "latent_width": 4}
    model["network_config"]["params"] |= sizes
    embedder = model["conditioner_config"]["params"]["emb_models"][0]["params"]
    embedder["model_dir"] = str(folder / "t5")
    model["first_stage_config"]["params"]["ckpt_path"] = str(folder / "vae.pt")
    model["sampler_config"]["params"]["num_steps"] = 2
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(sections))
    return str(path)


@pytest.fixture(scope="module")
def config(small: str) -> Config:
    return parse_config(SamplingArgs, "", ["--base", small])


@pytest.fixture(scope="module")
def with_weights(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The same with random weights, written in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "_write_apart", write_here)
        with config_with_weights(config, tmp_path_factory.mktemp("made") / "weights") as changed:
            return changed


def write_here(config: Config, folder: Path) -> None:
    from tools.make_random_weights import write_weights

    write_weights(config.model, **benchmark._paths_in(folder), t5_layers=1)


def options(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(
        [
            "--base",
            "x.yaml",
            "--no-compile",
            "--attention",
            "auto",
            "--warmup",
            "1",
            "--steps",
            "1",
            *words,
        ]
    )


def test_operations_of_the_2b_model_by_hand() -> None:
    # 30 layers of 12 · 1920² weights, 226 + 13 · 30 · 45 tokens: 47.2 + 72.8 TFLOP
    flops = forward_flops(30 * 12 * 1920**2, num_tokens=17776, num_layers=30, width=1920)
    assert flops == pytest.approx(119.98e12, rel=1e-4)


def test_median_leaves_the_warmup_out(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 3, 9])  # calls of 1, 2 and 6 s
    monkeypatch.setattr("tools.bench.measuring.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("tools.bench.measuring.choose_device", lambda: CPU)
    calls = []
    work = Workload(config, options("--warmup", "2", "--steps", "3"))
    measured = work.measure(lambda: calls.append(1))
    assert measured == Measured(seconds=2, peak_memory=0, spread=1.25)
    assert len(calls) == 5


@pytest.mark.parametrize("against", [(), ("--against", "diffusers")])
def test_all_lines_of_inference(with_weights: Config, against: tuple[str, ...]) -> None:
    if against:
        pytest.importorskip("diffusers")
    jobs = inference_jobs(with_weights, SECTIONS, options(*against))
    jobs = [job for job in jobs if job.label.startswith("own") != bool(against)]
    results = {(job.section, job.label): run_job(job, started=0.0) for job in jobs}
    baseline = {
        ("step", "diffusers"), ("decode", "diffusers"), ("decode", "diffusers, tiled"),
        ("encode", "diffusers"), ("encode", "diffusers, one pass"), ("t5", "transformers"),
        ("pipeline", "diffusers"),
    }  # fmt: skip
    if not against:
        # A CPU has one kernel of attention, which is the line before, and no float8 products.
        for label in ("own, flash", "own, sdpa", "own, fp8"):
            assert results.pop(("step", label)) is None
        own = [("step", "own"), ("decode", "own"), ("encode", "own"), ("t5", "own")]
        assert list(results) == [*own, ("pipeline", "own")]
        assert results["pipeline", "own"].startup_seconds > 0
        # Two samples of 32 + 3 · 2 · 2 tokens through a layer's 12 · 192² weights.
        flops = 2 * (2 * 12 * 192**2 * 44 + 4 * 192 * 44**2)
        assert results["step", "own"].model_flops == flops
    else:
        assert set(results) == baseline
        compared = {section for (section, _), one in results.items() if one.is_reference}
        assert compared == {"step", "decode", "encode", "t5", "pipeline"}
    assert {key: one.failure for key, one in results.items() if one.failure} == {}


def test_the_compiled_step_is_the_one_to_compare_with(config: Config) -> None:
    jobs = inference_jobs(config, ["step"], options("--compile", "--against", "diffusers"))
    assert [job.label for job in jobs if job.is_reference] == ["diffusers, compiled"]


def test_what_fails_or_does_not_apply_stops_no_other_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Another process cannot import this file, so its functions are not used.
    idle = partial(print, end="")
    wrong, deadly = partial(int, "x"), partial(os._exit, 9)
    runs = [idle, wrong, deadly, partial(Measured, 2.0, 3 * 10**9)]
    jobs = [Job("step", label, run, "same") for label, run in zip("nabc", runs, strict=True)]
    results = report(jobs, tmp_path / "out.json", head={"base": ["x.yaml"]})
    reason = "invalid literal for int() with base 10: 'x'"
    reasons = [reason, "its process was killed or crashed", None]
    assert [result.failure for result in results] == reasons
    assert (results[2].seconds, results[2].device) == (2.0, "cpu")
    printed = capfd.readouterr().err
    assert "step      a" in printed and f"failed: {reason}" in printed
    assert "step: n …\nskipped: cannot run on this device" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    lines = [dataclasses.asdict(result) for result in results]
    assert written == {"base": ["x.yaml"], "results": lines}


def test_the_process_ends_if_no_more_results_are_taken() -> None:
    runs = partial(int, "x"), partial(time.sleep, 60)
    results = run_jobs([Job("step", "a", run, "same") for run in runs])
    next(results)
    assert multiprocessing.active_children()
    results.close()
    assert not multiprocessing.active_children()


def test_warmup_and_steps_count_whole_videos(
    with_weights: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_steps = []

    def counting(*args: Any, **kwargs: Any) -> SATVideoDiffusionEngine:
        engine = load_engine(*args, **kwargs)
        sample_steps = engine.sample_steps

        def counted(*args: Any, sampler: Sampler, **kwargs: Any) -> Iterator[SampledStep]:
            num_steps.append(sampler.num_steps)
            return sample_steps(*args, sampler=sampler, **kwargs)

        engine.sample_steps = counted
        return engine

    monkeypatch.setattr("sgm.pipeline.load_engine", counting)
    monkeypatch.setattr("tools.bench.measuring.WARMUP_STEPS", 3)
    inference.pipeline(Workload(with_weights, options("--warmup", "2", "--steps", "3")))
    assert num_steps == [3, 3, 2, 2, 2]


def test_a_reason_is_one_line() -> None:
    def run() -> Measured:
        raise RuntimeError("CUDA out of memory.\nmore")

    assert run_job(Job("step", "a", run, "p"), started=0.0).failure == "CUDA out of memory."


def test_neighbours_share_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.bench.jobs._run_apart", lambda jobs: [len(jobs)])
    jobs = [Job("step", str(i), print, process) for i, process in enumerate("aabba")]
    assert list(run_jobs(jobs)) == [2, 2, 1]


def test_table_compares_within_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = (0.5, 2.0, 3 * 10**9, 1e12, 0.25, 0.01)
    own = BenchmarkResult("decode", "own", "cpu", *numbers, startup_seconds=4.0)
    broken = BenchmarkResult("decode", "tiled", failure="no memory")
    baseline = BenchmarkResult("decode", "diffusers", "cpu", 1.0, 1.0, is_reference=True)
    other = BenchmarkResult("step", "own", "cpu", 3.0, 1 / 3)
    print_table([own, broken, baseline, other])
    _, *lines, start = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["step", "own", "3.000", "0.0%", "0.333", "-", "-", "-"],
        ["decode", "own", "0.500", "1.0%", "2.000", "3.00", "25.0%", "0.500x"],
        ["decode", "tiled", "failed:", "no", "memory"],
        ["decode", "diffusers", "1.000", "0.0%", "1.000", "-", "-", "1.000x"],
    ]
    assert start == "decode, own: ready 4.0 s after the start of the process"


def test_weights_that_exist_are_used() -> None:
    config = parse_config(SamplingArgs, "", ["--base", INFER])
    root = CONFIGS.parent
    config.args.load = str(root / config.args.load)
    for node, key in (
        (config.model["first_stage_config"], "ckpt_path"),
        (config.model["conditioner_config"]["params"]["emb_models"][0], "model_dir"),
    ):
        node["params"][key] = str(root / node["params"][key])
    with config_with_weights(config, None) as used:
        assert used is config


def test_random_weights_are_removed_or_kept(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_write_apart", write_here)
    with config_with_weights(config, None) as used:
        folder = Path(used.args.load).parent
        assert (folder / "t5").is_dir()
    assert not folder.exists()
    with config_with_weights(config, tmp_path / "kept") as used:
        assert Path(used.args.load).parent == tmp_path / "kept"
    marked = tmp_path / "kept" / "t5" / "mark"
    marked.touch()
    with config_with_weights(config, tmp_path / "kept"):
        assert marked.exists()  # and not written again
    assert config.args.load != used.args.load


def test_sections_follow_from_the_configuration() -> None:
    sft, infer = (parse_config(TrainingArgs, "", ["--base", file]) for file in (SFT, INFER))
    assert choose_sections(sft, None) == ["train"]
    assert choose_sections(infer, None) == ["step", "decode", "encode", "t5", "pipeline"]
    assert choose_sections(infer, "decode") == ["decode"]
    assert choose_sections(infer, "t5,step") == ["step", "t5"]
    with pytest.raises(UserError, match="--only step does not fit a configuration with a section"):
        choose_sections(sft, "step")
    with pytest.raises(UserError, match="--only train does not fit a configuration without a sec"):
        choose_sections(infer, "step,train")
    with pytest.raises(UserError, match=r"--only steps .* choose from step, decode, encode, t5, "):
        choose_sections(infer, "steps")


def test_mistakes_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--steps, --warmup and --rank must be at least 1"):
        main(["--base", SFT, "--steps", "0"])
    monkeypatch.setattr("tools.benchmark.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--against diffusers needs diffusers; install with"):
        main(["--base", INFER, "--against", "diffusers"])


@pytest.mark.parametrize("name", ["absent/x.json", "."])
def test_results_need_a_file_in_a_folder_that_exists(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--json {name} cannot be written; name a file in an"):
        main(["--base", INFER, "--only", "t5", "--json", name])


@pytest.mark.parametrize("flags", [[], ["--attention", "hopper"]])
def test_attention_is_that_of_the_flag_or_of_the_configuration(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    sections = yaml.safe_load(Path(small).read_text())
    sections["args"]["attention"] = "sdpa" if flags else "hopper"
    path = tmp_path / "with_attention.yaml"
    path.write_text(yaml.safe_dump(sections))
    results = []

    def run_here(jobs: list[Job], *_: Any, **__: Any) -> list[BenchmarkResult]:
        results.extend(run_job(job, started=0.0) for job in jobs)
        return [result for result in results if isinstance(result, BenchmarkResult)]

    monkeypatch.setattr(benchmark, "report", run_here)
    assert main(["--base", str(path), "--only", "step", *flags]) == 1
    step, *others = results
    assert step.failure.startswith("attention: hopper does not run here: it needs Triton")
    assert others[:2] == [None, None]  # no other kernel is measured
    engine = load_engine(parse_config(SamplingArgs, "", ["--base", INFER, "--device", "cpu"]), CPU)
    monkeypatch.setattr(
        "sgm.pipeline.load_engine", lambda config, *_, **__: asked.append(config) or engine
    )
    asked: list[Config] = []
    config = parse_config(SamplingArgs, "", ["--base", INFER])
    inference.pipeline(Workload(config, options("--attention", "sdpa")))
    assert asked[0].args.attention == "sdpa" != config.args.attention


def test_this_projects_kernel_is_not_for_training() -> None:
    with pytest.raises(UserError, match="--attention hopper supports only sampling"):
        main(["--base", SFT, "--attention", "hopper"])


def test_flags_of_training_have_defaults() -> None:
    given = options("--rank", "4")
    assert (given.methods, given.rank, given.keep) == (METHODS, 4, ("attention",))


def test_the_exit_code_after_a_failure(
    small: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [BenchmarkResult("decode", "own", "cpu", 1.0, 1.0)]
    heads = []
    monkeypatch.setattr(benchmark, "report", lambda jobs, file, head: heads.append(head) or results)
    assert main(["--base", small, "--only", "decode"]) == 0
    head = heads[0]
    assert (head["argv"], head["base"]) == (["--base", small, "--only", "decode"], [small])
    assert head["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    results.append(BenchmarkResult("decode", "diffusers", failure="no memory"))
    assert main(["--base", small, "--only", "decode"]) == 1
    assert "failed: no memory" in capsys.readouterr().out
