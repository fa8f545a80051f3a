"""The training loop, and the objective that DeepSpeed trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from sgm.config import TrainingArgs
from sgm.data.loader import STEP
from sgm.distributed import is_main
from sgm.errors import UserError
from sgm.seeds import derived_seed
from sgm.training.checkpoint import Checkpointer, TrainingProgress
from sgm.training.deepspeed_engine import (
    NONFINITE_ADVICE,
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
    from deepspeed import DeepSpeedEngine

    from sgm.engine import SATVideoDiffusionEngine

logger = logging.getLogger(__name__)


class Trainer:
    """Runs the training steps, and validates and saves checkpoints between them.

    Args:
        wrapped: DeepSpeed's engine around the objective.
        engine: the model with all its parts.
        args: `train_iters`, `eval_interval`, `save_interval`, `save_total_limit`, `seed`,
            `nonfinite_limit`, `ema_decay`, and the fields that `Report` uses.
        run: the run's folder.
        checkpoint: the folder of the iteration to resume from; None starts a new training.
        validation: called before the first step, every `eval_interval` steps and at the end.

    Raises:
        UserError: the run cannot be resumed from `checkpoint`, or a file cannot be written.
    """

    def __init__(
        self,
        wrapped: DeepSpeedEngine,
        engine: SATVideoDiffusionEngine,
        args: TrainingArgs,
        *,
        run: Path,
        checkpoint: Path | None,
        validation: Validation,
    ) -> None:
        self.wrapped = wrapped
        self.engine = engine
        self.args = args
        self.validation = validation
        self.average = WeightAverage(wrapped, args.ema_decay) if args.ema_decay else None
        self.report = Report(
            args,
            folder=run,
            start_step=int(checkpoint.name) if checkpoint else 0,
            samples_per_step=wrapped.train_batch_size(),
            is_main=is_main(),
        )
        self.checkpointer = Checkpointer(
            wrapped=wrapped,
            run=run,
            average=self.average,
            report=self.report,
            limit=args.save_total_limit,
            base=engine.base_fingerprint,
        )
        self.progress = self.checkpointer.restore(checkpoint) if checkpoint else TrainingProgress()
        if wrapped.torch_autocast_enabled():  # DeepSpeed applies it in its engine's forward only
            engine.model.autocast_dtype = wrapped.torch_autocast_dtype()
        self.guard = StepGuard(wrapped.basic_optimizer)
        self.batch_size = wrapped.train_micro_batch_size_per_gpu()
        self.num_nonfinite = 0

    def run(self, batches: Iterator[Mapping[str, Any]]) -> None:
        """Train until step `train_iters`. All processes must call this.

        Args:
            batches: an endless stream of training batches. It must start at the sample
                `progress.samples`, because earlier samples were already used.

        Raises:
            UserError: a checkpoint cannot be written, or the loss is not finite for too many steps.
        """
        progress, total = self.progress, self.args.train_iters
        if progress.step == 0:
            self._validate()
        if progress.step >= total:
            logger.info("all %d steps are done; raise train_iters to continue", total)
        while progress.step < total:
            self._step(batches)
            done = progress.step == total
            if progress.step % self.args.eval_interval == 0 or done:
                self._validate()
            if progress.step % self.args.save_interval == 0 or done:
                with self.report.pause():
                    self.checkpointer.save(progress)
        self.report.close()

    def _step(self, batches: Iterator[Mapping[str, Any]]) -> None:
        """Do one optimizer step: `gradient_accumulation_steps` forward and backward passes."""
        progress, losses, norm = self.progress, [], None
        accumulation = self.wrapped.gradient_accumulation_steps()
        learning_rate = self.wrapped.get_lr()[0]  # read first: take_step changes it
        for part in range(accumulation):
            # Get the batch before setting the seed: a loader draws a random number when it starts.
            batch = next(batches)
            sample = progress.samples + distributed.get_rank() * self.batch_size
            torch.manual_seed(derived_seed(self.args.seed, STEP, sample))
            loss = self.wrapped(*self.engine.get_input(batch))
            self.wrapped.backward(loss)
            losses.append(loss.detach().float())
            progress.samples += distributed.get_world_size() * self.batch_size
            if part == accumulation - 1:
                norm = gradient_norm(self.wrapped)
                self.guard.void = not _all_finite(losses if norm is None else [*losses, norm])
            take_step(self.wrapped)
        progress.step += 1
        # DeepSpeed skips the step if gradients are not finite.
        has_moved = self.wrapped.was_step_applied()
        if self.guard.void or not (has_moved or seeks_scale(self.wrapped)):
            self._count_nonfinite(progress.step)
            return
        if has_moved:
            if norm is None:  # not read after a float16 overflow, when it is infinite
                norm = self.wrapped.get_global_grad_norm()
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
                f"{step}; {NONFINITE_ADVICE}"
            )

    def _validate(self) -> None:
        with self.report.pause(), outside_forward(self.wrapped):
            losses = self.validation.loss(self.engine)
            self.report.validation(self.progress.step, losses)
            self.validation.make_videos(self.engine, self.progress.step)


def _all_finite(values: list[Tensor]) -> bool:
    """Return whether all `values` (scalars) are finite on all processes."""
    finite = torch.stack(values).isfinite().all().to(torch.int32)
    if distributed.get_world_size() > 1:
        distributed.all_reduce(finite, distributed.ReduceOp.MIN)
    return bool(finite)


class TrainingObjective(nn.Module):
    """Computes the training loss of latents; this is the module that DeepSpeed wraps.

    Its weights are the transformer's weights, named as in SAT checkpoints. The autoencoder is not a
    submodule, because DeepSpeed would change its precision, partition it across processes and save
    it. For the same reason a text encoder is a submodule only if it has ``is_trainable``.
    """

    def __init__(self, engine: SATVideoDiffusionEngine) -> None:
        super().__init__()
        self.model = engine.model
        self.denoiser = engine.denoiser
        assert engine.loss_fn is not None  # training does not start without a loss_fn
        self.loss_fn: Callable[..., Tensor] = engine.loss_fn
        if engine.conditioner.is_trained:
            self.conditioner = engine.conditioner

    def forward(self, latents: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss of scaled latents (b, t, c, h, w); `cond` conditions b samples."""
        return self.loss_fn(self.model, self.denoiser, latents, cond).mean()
