"""Run the benchmark's jobs in new processes. Each job measures one line of the table."""

from __future__ import annotations

import gc
import itertools
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from sgm.cli import set_up_logging
from tools.bench.measuring import Measured, peak_rate

logger = logging.getLogger(__name__)

INFERENCE_SECTIONS = ("step", "decode", "encode", "t5", "pipeline")
SECTIONS = (*INFERENCE_SECTIONS, "train")
METHODS = ("lora", "full", "offload")  # training methods


@dataclass(frozen=True)
class Job:
    """A measurement that produces one line of the table.

    Args:
        section: what is measured; one of `SECTIONS`.
        label: name of the implementation that is measured.
        run: does the measurement; returns None to skip the line on this device. Must be picklable.
        process: name of a process; consecutive jobs with the same name share a process and its
            compiled code.
        is_reference: whether the other lines of the section are compared with this one.
    """

    section: str
    label: str
    run: Callable[[], Measured | None]
    process: str
    is_reference: bool = False


@dataclass(frozen=True)
class BenchmarkResult:
    """A line of the table. If the job failed, `failure` is the reason and there are no numbers.

    Args:
        section, label, is_reference: as in `Job`.
        device: name of the GPU, or "cpu".
        seconds, peak_memory, spread: as in `Measured`.
        samples_per_second: 1 / `seconds`.
        model_flops: FLOPs of the model in one run; None if they are not counted.
        peak_share: achieved fraction of the device's dense bf16 rate; None if the rate or
            `model_flops` is unknown.
        startup_seconds: time from the start of the process until everything was loaded; None if it
            is not measured.
        failure: the reason in one line; None if the job succeeded.
    """

    section: str
    label: str
    device: str = ""
    seconds: float | None = None
    samples_per_second: float | None = None
    peak_memory: int = 0
    model_flops: float | None = None
    peak_share: float | None = None
    spread: float = 0.0
    startup_seconds: float | None = None
    failure: str | None = None
    is_reference: bool = False


def new_process() -> ProcessPoolExecutor:
    """Return an executor with one process, which starts at the first call and sets up logging."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=set_up_logging)


def run_jobs(jobs: Sequence[Job]) -> Iterator[BenchmarkResult]:
    """Yield each job's result, in order, when the job ends; print the running job to stderr."""
    for _, group in itertools.groupby(jobs, key=lambda job: job.process):
        yield from _run_apart(list(group))


def _run_apart(jobs: Sequence[Job]) -> Iterator[BenchmarkResult]:
    """Run jobs in one process and yield their results; if it dies, continue in a new process."""
    started = time.time()
    with new_process() as process:
        for index, job in enumerate(jobs):
            print(f"{job.section}: {job.label} …", file=sys.stderr, flush=True)
            try:
                result = process.submit(run_job, job, started=started).result()
            except BrokenProcessPool:
                reason = "its process was killed or crashed"
                yield BenchmarkResult(job.section, job.label, failure=reason)
                yield from _run_apart(jobs[index + 1 :])
                return
            if result is not None:
                yield result
            else:
                print("skipped: cannot run on this device, or repeats a line", file=sys.stderr)


def run_job(job: Job, *, started: float) -> BenchmarkResult | None:
    """Run a job in this process, and free the GPU memory that the job allocated.

    Args:
        job: the job.
        started: `time.time()` at the start of the process.

    Returns:
        The result; None if the line is skipped.
    """
    on_gpu = torch.cuda.is_available()
    try:
        measured = job.run()
    except Exception as error:  # a failing line must not stop the others
        logger.debug("%s: %s", job.section, job.label, exc_info=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return BenchmarkResult(job.section, job.label, failure=reason)
    finally:
        if on_gpu:
            torch.compiler.reset()  # compiled code may hold weights
            gc.collect()
            torch.cuda.empty_cache()
    if measured is None:
        return None
    device = torch.cuda.get_device_name(0) if on_gpu else "cpu"
    seconds, flops, rate = measured.seconds, measured.flops, peak_rate(device)
    return BenchmarkResult(
        section=job.section,
        label=job.label,
        device=device,
        seconds=seconds,
        spread=measured.spread,
        samples_per_second=1 / seconds,
        peak_memory=measured.peak_memory,
        model_flops=flops,
        peak_share=flops / seconds / rate if flops and rate else None,
        startup_seconds=measured.ready_at - started if measured.ready_at else None,
        is_reference=job.is_reference,
    )
