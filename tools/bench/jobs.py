"""Measure the lines of the benchmark's table in processes of their own."""

from __future__ import annotations

import gc
import itertools
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from sgm.cli import set_up_logging

if TYPE_CHECKING:
    from tools.bench.measuring import Measured

logger = logging.getLogger(__name__)

INFERENCE_SECTIONS = ("step", "decode", "encode", "t5", "pipeline")
SECTIONS = (*INFERENCE_SECTIONS, "train")
METHODS = ("lora", "full", "offload")  # of training


class NotApplicableError(Exception):
    """A line cannot be measured on this device, or need not be; the message says why."""


@dataclass(frozen=True)
class Job:
    """The work of one line of the table.

    Args:
        section: what is measured.
        label: the implementation.
        run: measures it, or raises `NotApplicableError`; it can be pickled.
        process: consecutive jobs with the same name share a process and its compiled code.
        is_reference: the other lines of the section are compared with this one.
    """

    section: str
    label: str
    run: Callable[[], Measured]
    process: str
    is_reference: bool = False


@dataclass(frozen=True)
class BenchmarkResult:
    """A line of the table. A failed one has a `failure`, the reason, and no numbers.

    Args:
        section, label, is_reference: as in `Job`.
        device: name of the GPU, or "cpu".
        seconds, peak_memory, spread: as in `Measured`.
        samples_per_second: 1 / `seconds`.
        model_flops: operations, if they are counted.
        peak_share: fraction of the device's dense bf16 rate; None if that or `model_flops` is
            unknown.
        startup_seconds: from the start of the process until everything was loaded.
        failure: one line.
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


def run_jobs(jobs: Sequence[Job]) -> Iterator[BenchmarkResult]:
    """Yield the result of each job, in order, when it is finished; prints to stderr what runs."""
    started = time.monotonic()
    for _, group in itertools.groupby(jobs, key=lambda job: job.process):
        yield from _run_apart(list(group), started)


def _run_apart(jobs: Sequence[Job], started: float) -> Iterator[BenchmarkResult]:
    """Yield the results of jobs that share a process; if it ends early, the rest get another."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(jobs, sender, time.time()))
    process.start()
    sender.close()  # the process holds the only other copy, so its end closes the pipe
    try:
        for index, job in enumerate(jobs):
            elapsed = time.monotonic() - started
            print(f"[{elapsed:5.0f} s] {job.section}: {job.label} …", file=sys.stderr, flush=True)
            try:
                result = receiver.recv()
            except EOFError:
                process.join()
                reason = f"its process ended with code {process.exitcode}"
                yield BenchmarkResult(job.section, job.label, failure=reason)
                if rest := jobs[index + 1 :]:
                    yield from _run_apart(rest, started)
                return
            if isinstance(result, NotApplicableError):
                print(f"{job.section}: {job.label} is left out: {result}", file=sys.stderr)
            else:
                yield result
        process.join()
    finally:  # also if the caller takes no more results
        process.terminate()
        process.join()


def _work(jobs: Sequence[Job], sender: Connection, started: float) -> None:
    """Run in the process: send the result of each job, or the reason why it has none."""
    set_up_logging()
    try:
        for job in jobs:
            sender.send(run_job(job, started=started))
    except (KeyboardInterrupt, BrokenPipeError):
        return  # the receiver is gone


def run_job(job: Job, *, started: float) -> BenchmarkResult | NotApplicableError:
    """Run a job in this process, which began at `started`, and free the GPU memory it took.

    Args:
        job: the job.
        started: `time.time()` at the start of the process.

    Returns:
        Its result, or the reason why it has none.
    """
    import torch

    from tools.bench.measuring import choose_device, peak_rate

    device = choose_device()
    try:
        measured = job.run()
    except NotApplicableError as reason:
        return reason
    except Exception as error:  # no error of one line stops the others
        logger.debug("%s: %s", job.section, job.label, exc_info=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return BenchmarkResult(job.section, job.label, failure=reason)
    finally:
        if device.type == "cuda":
            torch.compiler.reset()  # compiled code may hold weights
            gc.collect()
            torch.cuda.empty_cache()
    seconds, flops, rate = measured.seconds, measured.flops, peak_rate(device)
    return BenchmarkResult(
        section=job.section,
        label=job.label,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        seconds=seconds,
        spread=measured.spread,
        samples_per_second=1 / seconds,
        peak_memory=measured.peak_memory,
        model_flops=flops,
        peak_share=flops / seconds / rate if flops and rate else None,
        startup_seconds=measured.ready_at - started if measured.ready_at else None,
        is_reference=job.is_reference,
    )
