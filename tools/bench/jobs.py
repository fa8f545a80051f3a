"""Lines of the benchmark's table, each measured in a process that what came before cannot reach."""

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


class DoesNotApply(Exception):
    """Raised by a line that cannot be measured here, or need not be; its text says why."""


@dataclass(frozen=True)
class Job:
    """What makes one line of the table.

    Args:
        section: what is measured.
        label: whose, and how.
        run: measures it, or raises `DoesNotApply`; a function that can be pickled.
        process: neighbours of the same process share one, and so what it has compiled.
        is_reference: the section's other lines are compared with this one.
    """

    section: str
    label: str
    run: Callable[[], Measured]
    process: str
    is_reference: bool = False


@dataclass(frozen=True)
class Result:
    """A line of the table; its `spread` is that of `Measured`.

    `peak_memory` is in bytes, 0 on a CPU; `peak_share` of the device's dense bf16 rate, None where
    that or `model_flops` is not known. `startup_seconds` go from the start of the process until
    all was loaded. A line that failed has a reason and no numbers.
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


def run_jobs(jobs: Sequence[Job]) -> Iterator[Result]:
    """The results of all jobs, in order, each as soon as it is there; tells on stderr what runs."""
    started = time.monotonic()
    for _, group in itertools.groupby(jobs, key=lambda job: job.process):
        yield from _run_apart(list(group), started)


def _run_apart(jobs: Sequence[Job], started: float) -> Iterator[Result]:
    """The results of jobs that share a process; if it dies of one, the rest get another."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(jobs, sender, time.time()))
    process.start()
    sender.close()  # the other end is the process's alone, so that its death ends the pipe
    try:
        for index, job in enumerate(jobs):
            elapsed = time.monotonic() - started
            print(f"[{elapsed:5.0f} s] {job.section}: {job.label} …", file=sys.stderr, flush=True)
            try:
                result = receiver.recv()
            except EOFError:
                process.join()
                reason = f"its process ended with code {process.exitcode}"
                yield Result(job.section, job.label, failure=reason)
                rest = jobs[index + 1 :]
                if rest:
                    yield from _run_apart(rest, started)
                return
            if isinstance(result, DoesNotApply):
                print(f"{job.section}: {job.label} is left out: {result}", file=sys.stderr)
            else:
                yield result
        process.join()
    finally:  # whoever stops listening ends the process too
        process.terminate()
        process.join()


def _work(jobs: Sequence[Job], sender: Connection, started: float) -> None:
    """The process: sends each job's result, or why there is none, to the other end."""
    set_up_logging()
    try:
        for job in jobs:
            sender.send(run_job(job, started=started))
    except (KeyboardInterrupt, BrokenPipeError):
        return  # nobody listens any more


def run_job(job: Job, *, started: float) -> Result | DoesNotApply:
    """A job's result in this process, which began at `started`; nothing stays in its memory."""
    import torch

    from tools.bench.measuring import choose_device, peak_rate

    device = choose_device()
    try:
        measured = job.run()
    except DoesNotApply as reason:
        return reason
    except Exception as error:  # whatever it is, the other lines can be measured all the same
        logger.debug("%s: %s", job.section, job.label, exc_info=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Result(job.section, job.label, failure=reason)
    finally:
        if device.type == "cuda":
            torch.compiler.reset()  # what was compiled may hold weights
            gc.collect()
            torch.cuda.empty_cache()
    seconds, flops, rate = measured.seconds, measured.flops, peak_rate(device)
    return Result(
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
