"""The training loop, and the objective that DeepSpeed trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from sgm.data.loader import STEP
from sgm.errors import UserError
from sgm.seeds import derived_seed
from sgm.training.checkpoint import Checkpointer, Progress
from sgm.training.deepspeed_engine import (
    WHAT_TO_DO,
    StepGuard,
    gradient_norm,
    outside_forward,
    seeks_scale,
    take_step,
)
from sgm.training.ema import WeightAverage
from sgm.training.report import Report
from sgm.training.validation import Validation

if TYPE_CHECKING:
    from sgm.engine import SATVideoDiffusionEngine

logger = logging.getLogger(__name__)


# A batch as it comes from the loader → (scaled latents, conditioning).
GetInput = Callable[[Mapping[str, Any]], tuple[Tensor, dict[str, Tensor]]]


class Trainer:
    """Steps, and what happens between them.

    Args:
        wrapped: DeepSpeed's engine around the objective.
        engine: the model with all its parts.
        args: train_iters, intervals, seed, nonfinite_limit.
        batch_size: samples of a process in a forward pass.
    """

    def __init__(
        self,
        wrapped: Any,
        engine: Any,
        args: Any,
        *,
        batch_size: int,
        checkpointer: Checkpointer,
        report: Report,
        validation: Validation | None,
        average: WeightAverage | None,
    ) -> None:
        self.wrapped = wrapped
        self.engine = engine
        self.args = args
        self.batch_size = batch_size
        self.checkpointer = checkpointer
        self.report = report
        self.validation = validation
        self.average = average
        if wrapped.torch_autocast_enabled():  # DeepSpeed's is around its own forward pass only
            engine.model.autocast_dtype = wrapped.torch_autocast_dtype()
        self.guard = StepGuard(wrapped.basic_optimizer)
        self.accumulation = wrapped.gradient_accumulation_steps()
        self.num_nonfinite = 0

    def run(self, batches: Iterator[Mapping[str, Any]], progress: Progress) -> None:
        """Train from `progress` to `train_iters`; all processes take part.

        Raises:
            UserError: a checkpoint cannot be written, or the loss stays not finite.
        """
        try:
            self._go_on(batches, progress)
        except KeyboardInterrupt:
            self._say_what_is_saved(progress.step)
            raise

    def _go_on(self, batches: Iterator[Mapping[str, Any]], progress: Progress) -> None:
        if progress.step == 0:
            self._validate(progress)
        if progress.step >= self.args.train_iters:
            logger.info(
                "%d steps are done and train_iters is %d, so nothing is left to do; raise it to "
                "train on",
                *(progress.step, self.args.train_iters),
            )
        while progress.step < self.args.train_iters:
            self._step(batches, progress)
            done = progress.step == self.args.train_iters
            if progress.step % self.args.eval_interval == 0 or done:
                self._validate(progress)
            if progress.step % self.args.save_interval == 0 or done:
                with self.report.pause():
                    self.checkpointer.save(progress)

    def _say_what_is_saved(self, step: int) -> None:
        """For who ends a run: how to go on, and from where."""
        run = self.checkpointer.run
        try:
            saved = (run / "latest").read_text("utf-8", errors="replace")
        except OSError:
            told = f"nothing is saved yet in {run}"
        else:
            told = f"the last checkpoint is {run}/{saved}, from which --resume {run} goes on"
        with self.report.pause():
            logger.info("stopped after step %d; %s", step, told)

    def _step(self, batches: Iterator[Mapping[str, Any]], progress: Progress) -> None:
        """One step of the optimizer: `gradient_accumulation_steps` passes."""
        losses, norm = [], None
        learning_rate = self.wrapped.get_lr()[0]  # later it is the next step's
        for part in range(self.accumulation):
            batch = next(batches)  # first, as a loader that starts draws a number
            sample = progress.samples + distributed.get_rank() * self.batch_size
            torch.manual_seed(derived_seed(self.args.seed, STEP, sample))
            loss = self.wrapped(*self.engine.get_input(batch))
            self.wrapped.backward(loss)
            losses.append(loss.detach().float())
            progress.samples += distributed.get_world_size() * self.batch_size
            if part == self.accumulation - 1:
                norm = gradient_norm(self.wrapped)
                self.guard.void = not self._all_finite(losses if norm is None else [*losses, norm])
            take_step(self.wrapped)
        progress.step += 1
        # DeepSpeed takes no step where gradients are not finite.
        has_moved = self.wrapped.was_step_applied()
        if self.guard.void or not (has_moved or seeks_scale(self.wrapped)):
            self._count_nonfinite(progress.step)
            return
        if norm is None and has_moved:  # where float16 overflowed it is infinite
            norm = self.wrapped.get_global_grad_norm()
        if has_moved:
            self.num_nonfinite = 0
            if self.average is not None:
                self.average.update(progress.step)
        self.report.step(
            progress.step,
            torch.stack(losses).mean(),
            lr=learning_rate,
            grad_norm=norm,
            loss_scale=self.wrapped.optimizer.loss_scale if self.wrapped.fp16_enabled() else None,
        )

    def _all_finite(self, values: list[Tensor]) -> bool:
        """Whether the losses of this step, and its gradients' norm, are finite everywhere."""
        finite = torch.stack(values).isfinite().all().to(torch.int32)
        if distributed.get_world_size() > 1:
            distributed.all_reduce(finite, distributed.ReduceOp.MIN)
        return bool(finite)

    def _count_nonfinite(self, step: int) -> None:
        self.num_nonfinite += 1
        limit = self.args.nonfinite_limit
        logger.warning(
            "step %d: the loss or its gradient is not finite; the step is skipped (%d of at most "
            "%d in a row)",
            *(step, self.num_nonfinite, limit),
        )
        if self.num_nonfinite >= limit:
            raise UserError(
                f"the loss or its gradient was not finite for {limit} steps in a row, up to step "
                f"{step}; {WHAT_TO_DO}"
            )

    def _validate(self, progress: Progress) -> None:
        if self.validation is None:
            return
        with self.report.pause(), outside_forward(self.wrapped):
            losses = self.validation.loss(self.engine)
            self.report.validation(progress.step, losses)
            self.validation.make_videos(self.engine, progress.step)


class TrainingObjective(nn.Module):
    """The loss of latents. Its weights are the transformer's, named as in SAT checkpoints.

    Autoencoder and text encoder stay outside: DeepSpeed would change their precision, divide them
    among processes and save them. Only a text encoder with ``is_trainable`` joins in.
    """

    def __init__(self, engine: SATVideoDiffusionEngine) -> None:
        super().__init__()
        self.model = engine.model
        self.denoiser = engine.denoiser
        self.loss_fn = engine.loss_fn
        if engine.conditioner.is_trained:
            self.conditioner = engine.conditioner

    def forward(self, latents: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of latents (b, t, c, h, w), scaled, with conditioning of b samples."""
        return self.loss_fn(self.model, self.denoiser, latents, cond).mean()
