"""What a training run says of itself: lines of the log, a bar on a terminal, curves."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from sgm.progress import Progress
from sgm.training.trackers import TensorBoard, Tracker, WeightsAndBiases

logger = logging.getLogger(__name__)

# Of the smoothed loss: the weight of the past at each step.
SMOOTHING = 0.98


class Report:
    """Told of every optimizer step, it says one line every `log_interval` steps.

    The loss stays on its device between two lines; then it is read, as the mean over processes.
    All processes must call `step` alike, since that mean is made together.

    Args:
        args: log_interval, wandb, wandb_project_name; all of it is kept with a wandb run.
        folder: the run's; TensorBoard's files go to ``tensorboard`` in it.
        start_step: steps that were done when this process began.
        total_steps: number of the last step.
        samples_per_step: samples of all processes in one step.
        is_main: whether this process speaks for all.

    Raises:
        UserError: a file cannot be written, or wandb cannot start.
    """

    def __init__(
        self,
        args: Any,
        *,
        folder: Path,
        start_step: int,
        total_steps: int,
        samples_per_step: int,
        is_main: bool,
    ) -> None:
        self.log_interval = args.log_interval
        self.total_steps = total_steps
        self.samples_per_step = samples_per_step
        self.trackers: list[Tracker] = []
        self._progress = None
        if is_main:
            if args.wandb:
                project = args.wandb_project_name
                self.trackers.append(WeightsAndBiases(folder, project=project, config=vars(args)))
            self.trackers.append(TensorBoard(folder / "tensorboard", start_step=start_step))
            self._progress = Progress(total_steps, done=start_step, lines=False)
        # Sum and number of the losses since the last line, then the same with fading weights.
        self._sums = torch.zeros(2, 2, dtype=torch.float64)
        self._last_step = self._last_line = start_step
        self._seconds, self._running_since = 0.0, time.perf_counter()

    def step(
        self,
        step: int,
        loss: Tensor,
        *,
        lr: float,
        grad_norm: Tensor | float | None = None,
        loss_scale: float | None = None,
    ) -> None:
        """A step is done; says a line where one is due.

        Args:
            step: its number, from 1; numbers may be left out, of steps that were skipped.
            loss: scalar, this process's mean; left out of the means where it is not finite.
            lr: learning rate.
            grad_norm: norm of the gradient before clipping.
            loss_scale: of float16; None where there is none.
        """
        self._add(loss)
        if self._progress is not None:
            for _ in range(step - self._last_step):
                self._progress.step("training")
        self._last_step = step
        # The line of a step that was skipped comes with the next one.
        due = step // self.log_interval > self._last_line // self.log_interval
        if due or step == self.total_steps:
            self._say_line(step, lr=lr, grad_norm=grad_norm, loss_scale=loss_scale)

    def _add(self, loss: Tensor) -> None:
        """Take in a loss without waiting for its device."""
        self._sums = self._sums.to(loss.device)
        loss = loss.detach().to(torch.float64)
        finite = loss.isfinite()
        new = torch.stack([torch.where(finite, loss, 0.0), finite.to(torch.float64)])
        fading = SMOOTHING * self._sums[1] + (1 - SMOOTHING) * new
        self._sums = torch.stack([self._sums[0] + new, fading])  # (2, 2)

    def _say_line(
        self,
        step: int,
        *,
        lr: float,
        grad_norm: Tensor | float | None,
        loss_scale: float | None,
    ) -> None:
        loss, smoothed = self._read_losses()  # waits for the device, so it comes before the clock
        now = time.perf_counter()
        self._seconds += now - self._running_since
        seconds = max(self._seconds / (step - self._last_line), 1e-9)
        self._seconds, self._running_since, self._last_line = 0.0, now, step
        values = {
            "loss": loss,
            "loss_smoothed": smoothed,
            "lr": lr,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "loss_scale": loss_scale,
            "seconds_per_step": seconds,
            "samples_per_second": self.samples_per_step / seconds,
            "peak_gib": peak_gib(self._sums.device),
        }
        left = time_in_words(seconds * (self.total_steps - step))
        self._say(f"step {step} of {self.total_steps}: {_describe(values)}, {left} left")
        curves = {f"train/{name}": value for name, value in values.items() if value is not None}
        for tracker in self.trackers:
            tracker.log(step, curves)

    def _read_losses(self) -> tuple[float, float]:
        """Mean loss since the last line and smoothed loss, over all processes."""
        self._share_sums()
        (total, number), (fading_total, fading_number) = self._sums.tolist()
        self._sums[0] = 0.0
        # The fading weights add up to less than 1 at first; dividing by them mends it (Kingma and
        # Ba, "Adam" (2014), section 3).
        return _ratio(total, number), _ratio(fading_total, fading_number)

    def _share_sums(self) -> None:
        """Give each process the same share of all sums, to go on from; all must call it."""
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(self._sums)
            self._sums /= distributed.get_world_size()

    def validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Say what a validation at `step` found: ``loss`` and further ones, as `Validation` does.

        Nothing is said of an empty one.
        """
        if not losses:
            return
        parts = [f"{name} {value:.4f}" for name, value in losses.items() if name != "loss"]
        rest = f" ({', '.join(parts)})" if parts else ""
        self._say(f"step {step}: validation loss {losses['loss']:.4f}{rest}")
        for tracker in self.trackers:
            tracker.log(step, {f"valid/{name}": value for name, value in losses.items()})

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Work that is no training, such as saving; its time is not counted."""
        _wait_for(self._sums.device)
        self._seconds += time.perf_counter() - self._running_since
        try:
            if self._progress is None:
                yield
            else:
                with self._progress.hidden():
                    yield
        finally:
            _wait_for(self._sums.device)
            self._running_since = time.perf_counter()

    def _say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.say(line)

    def close(self) -> None:
        """Close the bar and the curves."""
        if self._progress is not None:
            self._progress.close()
        while self.trackers:
            self.trackers.pop().close()

    def state_dict(self) -> dict[str, Any]:
        """What every process needs to go on with the same figures; all must call it."""
        self._share_sums()
        return {"sums": self._sums.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; seconds are counted from here on."""
        self._sums = torch.tensor(state["sums"], dtype=torch.float64)


def _ratio(total: float, number: float) -> float:
    return total / number if number else math.nan


def _describe(values: Mapping[str, float | None]) -> str:
    """The figures of a line but for the time left."""
    parts: Sequence[tuple[str, str]] = (
        ("loss", "loss {:.4f}"),
        ("loss_smoothed", "(smoothed {:.4f}),"),
        ("lr", "lr {:.2e},"),
        ("grad_norm", "grad norm {:.3g},"),
        ("loss_scale", "loss scale {:g},"),
        ("seconds_per_step", "{:.3f} s/step,"),
        ("samples_per_second", "{:.1f} samples/s,"),
        ("peak_gib", "peak {:.1f} GiB"),
    )
    return " ".join(form.format(values[name]) for name, form in parts if values[name] is not None)


def time_in_words(seconds: float) -> str:
    """Such as ``40 s``, ``6 min``, ``2 h 5 min`` or ``3 d 4 h``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process so far: on the GPU, or in the host's RAM without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def _wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
