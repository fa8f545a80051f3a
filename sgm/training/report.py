"""Report the progress of a training run: log lines, a terminal progress bar, and curves."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from sgm.config import TrainingArgs
from sgm.progress import Progress
from sgm.training.trackers import MetricsFile, TensorBoard, WeightsAndBiases

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
# Decay factor of the smoothed loss per step.
SMOOTHING = 0.98


class Report:
    """Collects the loss of each optimizer step and logs a line every `log_interval` steps.

    Losses are summed on their device, and averaged over all processes only when a line is logged.
    Averaging is a collective operation, so all processes must call `step` for the same steps.

    Args:
        args: log_interval, train_iters, wandb, wandb_project_name. All of `args` is sent to wandb
            as the run's settings.
        folder: the run's folder. Metrics go to ``metrics.jsonl`` and ``tensorboard`` in it.
        start_step: the number of steps done before this process started.
        samples_per_step: the number of samples in one step, of all processes together.
        is_main: whether this process logs and writes files.

    Raises:
        UserError: a file cannot be written, or wandb cannot start.
    """

    def __init__(
        self,
        args: TrainingArgs,
        *,
        folder: Path,
        start_step: int,
        samples_per_step: int,
        is_main: bool,
    ) -> None:
        self.log_interval, self.total_steps = args.log_interval, args.train_iters
        self.samples_per_step = samples_per_step
        self.is_main = is_main
        self.trackers: list[WeightsAndBiases | MetricsFile | TensorBoard] = []
        if is_main:
            if args.wandb:
                project = args.wandb_project_name
                self.trackers.append(WeightsAndBiases(folder, project=project, config=vars(args)))
            self.trackers.append(MetricsFile(folder / METRICS_FILE, start_step=start_step))
            self.trackers.append(TensorBoard(folder / "tensorboard", start_step=start_step))
        self._progress = Progress(self.total_steps, done=start_step, lines=False)
        # Rows: losses since the last line, exponentially decayed losses. Columns: sum, count.
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
        """Report a finished step; log a line if one is due.

        Args:
            step: the number of the step, from 1. Skipped steps need not be reported.
            loss: the mean loss of this process, a scalar; ignored if it is not finite.
            lr: the learning rate.
            grad_norm: the gradient norm before clipping.
            loss_scale: the loss scale of float16.
        """
        self._add(loss)
        for _ in range(step - self._last_step):
            self._progress.step("training")
        self._last_step = step
        # If a multiple of log_interval was skipped, the next reported step logs the line.
        due = step // self.log_interval > self._last_line // self.log_interval
        if not (due or step == self.total_steps):
            return
        mean, smoothed = self._read_losses()  # first, because it waits for the device
        now = time.perf_counter()
        self._seconds += now - self._running_since
        seconds = max(self._seconds / (step - self._last_line), 1e-9)
        self._seconds, self._running_since, self._last_line = 0.0, now, step
        # Name of the curve, value, and format in the log line.
        figures = [
            ("loss", mean, "loss {:.4f}"),
            ("loss_smoothed", smoothed, "(smoothed {:.4f}),"),
            ("lr", lr, "lr {:.2e},"),
            ("grad_norm", None if grad_norm is None else float(grad_norm), "grad norm {:.3g},"),
            ("loss_scale", loss_scale, "loss scale {:g},"),
            ("seconds_per_step", seconds, "{:.3f} s/step,"),
            ("samples_per_second", self.samples_per_step / seconds, "{:.1f} samples/s,"),
            ("peak_gib", _peak_gib(self._sums.device), "peak {:.1f} GiB,"),
        ]
        present = [(name, value, form) for name, value, form in figures if value is not None]
        text = " ".join(form.format(value) for _, value, form in present)
        left = timedelta(seconds=round(seconds * (self.total_steps - step)))
        line = f"step {step} of {self.total_steps}: {text} {left} left"
        self._log(step, line, {f"train/{name}": value for name, value, _ in present})

    def _add(self, loss: Tensor) -> None:
        """Add a loss to the sums without waiting for the device."""
        self._sums = self._sums.to(loss.device)
        loss = loss.detach().to(torch.float64)
        finite = loss.isfinite()
        new = torch.stack([torch.where(finite, loss, 0.0), finite.to(torch.float64)])
        fading = SMOOTHING * self._sums[1] + (1 - SMOOTHING) * new
        self._sums = torch.stack([self._sums[0] + new, fading])  # (2, 2)

    def _read_losses(self) -> list[float]:
        """Return the mean loss since the last line, and the smoothed loss, over all processes."""
        self._share_sums()
        sums = self._sums.tolist()
        self._sums[0] = 0.0
        # At first the decayed weights add up to less than 1, so divide by their sum (as Kingma and
        # Ba, "Adam" (2014), section 3).
        return [total / number if number else math.nan for total, number in sums]

    def _share_sums(self) -> None:
        """Average the sums over all processes; a collective operation."""
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(self._sums)
            self._sums /= distributed.get_world_size()

    def validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Report the validation losses at `step`, as returned by `Validation.loss`.

        Nothing is logged if `losses` is empty.
        """
        if not losses:
            return
        parts = [f"{name} {value:.4f}" for name, value in losses.items() if name != "loss"]
        rest = f" ({', '.join(parts)})" if parts else ""
        line = f"step {step}: validation loss {losses['loss']:.4f}{rest}"
        self._log(step, line, {f"valid/{name}": value for name, value in losses.items()})

    def _log(self, step: int, line: str, scalars: Mapping[str, float]) -> None:
        if self.is_main:
            self._progress.say(line)
        for tracker in list(self.trackers):
            try:
                tracker.log(step, scalars)
            except OSError as error:  # a failed write must not end the training
                logger.warning("%s: %s; it is disabled now", type(tracker).__name__, error)
                self.trackers.remove(tracker)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time spent in this context, for work such as saving, from the step times."""
        _wait_for(self._sums.device)
        self._seconds += time.perf_counter() - self._running_since
        try:
            with self._progress.hidden():
                yield
        finally:
            _wait_for(self._sums.device)
            self._running_since = time.perf_counter()

    def close(self) -> None:
        """Close the progress bar and the trackers."""
        self._progress.close()
        while self.trackers:
            self.trackers.pop().close()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of losses, equal on all processes; a collective operation."""
        self._share_sums()
        return {"sums": self._sums.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the sums that `state_dict` returned."""
        self._sums = torch.tensor(state["sums"], dtype=torch.float64)


def _peak_gib(device: torch.device) -> float:
    """Return this process's peak memory in GiB: on `device` if it is a GPU, else on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def _wait_for(device: torch.device) -> None:
    """Wait until `device` has finished its work, if it is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
