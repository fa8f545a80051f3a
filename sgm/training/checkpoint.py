"""Save checkpoints of a training run, and resume from them with bit-identical results.

The folder of a checkpoint, ``{iteration}``, contains:

- ``mp_rank_00_model_states.pt``: the weights, in the layout that `load` and `lora` read.
- ``training_state.pt``: the counters, the learning rate schedule, and the optimizer state unless
  ZeRO partitions it.
- ``optimizer_rank_NN.pt``, one file per process: the optimizer state if ZeRO partitions it.

A second folder, ``{iteration}-ema``, contains a weights file with the moving average, in float32.
The states of random generators are not saved, because each sample and each step has its own seed
(see `sgm.data.loader`).
"""

from __future__ import annotations

import contextlib
import enum
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor, distributed

from sgm.checkpoint.find import MODEL_FILES, Weights
from sgm.checkpoint.lora import lora_record
from sgm.checkpoint.reading import read_checkpoint, tensors_of
from sgm.checkpoint.strict_loading import check_fit
from sgm.checkpoint.transformer import is_lora_matrix
from sgm.distributed import is_main
from sgm.errors import UserError
from sgm.files import save_torch
from sgm.options import Section
from sgm.training import run_folder
from sgm.training.deepspeed_engine import NONFINITE_ADVICE, gathered, reason_of, trained_weights
from sgm.training.ema import WeightAverage
from sgm.training.report import Report

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from sgm.engine import SATVideoDiffusionEngine

logger = logging.getLogger(__name__)

WEIGHTS_FILE = MODEL_FILES[0]
STATE_FILE = "training_state.pt"
_RANK_FILE = "optimizer_rank_{:02d}.pt"
_CONDITIONER = "conditioner."
_LOSS_SCALER = "loss_scaler"
# Objects that only DeepSpeed's own checkpoint loading needs, which is not used here.
_UNUSED_KEYS = ("param_slice_mappings", "universal_checkpoint_info")


class _State(Section):
    """The contents of ``training_state.pt``; `optimizer` is None if ZeRO partitions it."""

    step: int = Field(ge=0)
    samples: int = Field(ge=0)
    processes: int = Field(ge=1)
    schedule: dict[str, Any]
    watched: dict[str, dict[str, Any]]
    optimizer: dict[str, Any] | None


@dataclass
class TrainingProgress:
    """Progress of a run: the optimizer steps done, and the training samples used by them."""

    step: int = 0
    samples: int = 0


@dataclass(kw_only=True)
class Checkpointer:
    """Saves and restores the state of a run.

    Args:
        wrapped: DeepSpeed's engine.
        run: the run's folder.
        average: the moving average of the weights, or None.
        report: the report, whose sums of losses are saved too.
        limit: the number of checkpoints to keep; 0 keeps all.
        base: `fingerprint` of the weights that the training started from.
    """

    wrapped: DeepSpeedEngine
    run: Path
    average: WeightAverage | None
    report: Report
    limit: int
    base: str | None

    def __post_init__(self) -> None:
        from deepspeed.runtime.base_optimizer import ZeROOptimizer

        # Whether each process holds its own part of the optimizer state.
        self.divided = isinstance(self.wrapped.optimizer, ZeROOptimizer)

    def save(self, progress: TrainingProgress) -> None:
        """Write a checkpoint and make it the latest one; all processes must call it.

        Raises:
            UserError: a file cannot be written, or a weight is not finite.
        """
        name = str(progress.step)
        folder = run_folder.new_partial(self.run, name)
        self._write_weights(folder, averages={})
        if self.average is not None:
            ema = run_folder.new_partial(self.run, f"{name}{run_folder.EMA}")
            self._write_weights(ema, averages=self.average.averages)
        if self.divided:
            path = folder / _RANK_FILE.format(distributed.get_rank())
            save_torch(_plain(self._optimizer_state()), path)
        state = {
            "step": progress.step,
            "samples": progress.samples,
            "processes": distributed.get_world_size(),
            "schedule": self.wrapped.lr_scheduler.state_dict(),
            "watched": {"report": self.report.state_dict()},  # a collective call
            "optimizer": None if self.divided else self._optimizer_state(),
        }
        if is_main():
            save_torch(_plain(state), folder / STATE_FILE)
        distributed.barrier()
        if is_main():
            run_folder.publish(self.run, progress.step, limit=self.limit)
            logger.info("saved %s", self.run / name)
        distributed.barrier()

    def restore(self, folder: Path) -> TrainingProgress:
        """Restore the state from a checkpoint's folder; the weights must be loaded already.

        Raises:
            UserError: a file is missing or damaged, or was saved with another number of processes
                or other DeepSpeed settings.
        """
        path = folder / STATE_FILE
        try:
            state = _State.model_validate(read_checkpoint(path))
        except ValidationError:
            raise UserError(f"{path} is not a training state; resume another checkpoint") from None
        processes = distributed.get_world_size()
        if (state.optimizer is None) != self.divided:
            raise UserError(
                f"{folder} was saved with another zero_optimization.stage or precision; use the "
                "deepspeed section of training_config.yaml in the run's folder"
            )
        if self.divided and state.processes != processes:
            raise UserError(
                f"{folder} was saved by {state.processes} processes and cannot be resumed by "
                f"{processes}, because ZeRO splits the optimizer state among processes; resume "
                f"with NPROC={state.processes}, or start a new run with load: {folder}"
            )
        optimizer: Any = state.optimizer
        if self.divided:
            optimizer = read_checkpoint(folder / _RANK_FILE.format(distributed.get_rank()))
        try:
            with _kept_settings(self.wrapped):
                self._load_optimizer(optimizer)
            schedule = self.wrapped.lr_scheduler
            schedule.load_state_dict(state.schedule)
            if "num_iters" in state.schedule:  # SAT's schedule does not apply the loaded step
                schedule.step(state.schedule["num_iters"])
            self.report.load_state_dict(state.watched["report"])
        except (KeyError, ValueError, RuntimeError, AssertionError, TypeError) as error:
            raise UserError(
                f"{folder} cannot be resumed ({reason_of(error)}); the trained weights and the "
                "deepspeed section must match training_config.yaml in the run's folder"
            ) from error
        if self.average is not None:
            self._restore_average(self.average, folder.with_name(f"{folder.name}{run_folder.EMA}"))
        self.wrapped.global_steps = state.step
        return TrainingProgress(step=state.step, samples=state.samples)

    def _write_weights(self, folder: Path, *, averages: Mapping[str, Tensor]) -> None:
        """Write the weights; for names in `averages`, write the average instead of the weight."""
        model, module = self.wrapped.module, {}
        is_lora = trains_lora(model)
        weights = trained_weights(model) if is_lora else dict(model.named_parameters())
        for name, weight in weights.items():
            with gathered(self.wrapped, [weight]):
                if not is_main():
                    continue
                source = averages.get(name, weight).detach()
                # Such weights cannot be trained further, and saving may delete a good checkpoint.
                if not source.isfinite().all():
                    raise UserError(
                        f"the weight {name} has values that are not finite, so no checkpoint is "
                        f"saved; {NONFINITE_ADVICE}"
                    )
                module[name] = source.to("cpu", copy=True)
        if is_main():
            network = model.model.diffusion_model
            record = {"lora": lora_record(network, self.base)} if is_lora else {}
            save_torch({"module": module, **record}, folder / WEIGHTS_FILE)

    def _optimizer_state(self) -> dict[str, Any]:
        state = self.wrapped.optimizer.state_dict()
        if _LOSS_SCALER in state:
            state[_LOSS_SCALER] = vars(state[_LOSS_SCALER])
        return {key: value for key, value in state.items() if key not in _UNUSED_KEYS}

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        optimizer = self.wrapped.optimizer
        if _LOSS_SCALER in state:
            vars(optimizer.loss_scaler).update(state[_LOSS_SCALER])
            state[_LOSS_SCALER] = optimizer.loss_scaler
        if not self.divided:
            optimizer.load_state_dict(state)
            return
        # DeepSpeed expects a mapping from ranks to states and reads only the entry of its own rank.
        # One of its optimizers prints while loading.
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer.load_state_dict({distributed.get_rank(): state}, load_from_fp32_weights=True)

    def _restore_average(self, average: WeightAverage, folder: Path) -> None:
        """Load the moving average from its folder."""
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise UserError(
                f"{path} does not exist, so the moving average cannot be resumed; set ema_decay to "
                "0 to resume without it"
            )
        module = tensors_of(read_checkpoint(path), path)
        averages = average.averages
        found = {name: tensor for name, tensor in module.items() if name in averages}
        hint = "resume from another iteration, or set ema_decay to 0"
        check_fit(found, averages, path=path, hint=hint, model="the trained weights")
        average.load(found)


def trains_lora(module: torch.nn.Module) -> bool:
    """Return whether `module` trains LoRA matrices only, so that only they are saved."""
    return all(is_lora_matrix(name) for name in trained_weights(module))


def holds_lora(checkpoint: Weights) -> bool:
    """Return whether a run's checkpoint contains LoRA matrices only.

    Raises:
        UserError: the weights file cannot be read.
    """
    state = checkpoint.file.read().state
    return isinstance(state, Mapping) and "lora" in state


def check_conditioner(engine: SATVideoDiffusionEngine, checkpoint: Weights) -> dict[str, Tensor]:
    """Return the text encoder's weights in a run's checkpoint; empty if it was not trained.

    Raises:
        UserError: the weights do not fit the text encoder of `engine`.
    """
    module = checkpoint.file.tensors()
    stored = {name: tensor for name, tensor in module.items() if name.startswith(_CONDITIONER)}
    if stored:
        own = {n: w for n, w in engine.named_parameters() if n.startswith(_CONDITIONER)}
        hint = "use the text encoder that the run was started with"
        check_fit(stored, own, path=checkpoint.path, hint=hint)
    return stored


def check_state_file(path: Path) -> None:
    """Check that `path`, a file of the training state in a checkpoint's folder, exists.

    Raises:
        UserError: the file is missing, so only the weights in the folder can be used.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist, so the run cannot be resumed; start a new run with load: "
            f"{path.parent} (if it contains a LoRA, merge it with tools/merge_lora.py first and "
            "load the merged weights)"
        )


@contextlib.contextmanager
def _kept_settings(wrapped: DeepSpeedEngine) -> Iterator[None]:
    """Keep the optimizer's settings (weight decay, …) unchanged by a state loaded in this context.

    The learning rate is taken from the loaded state because the schedule controls it. The same
    holds for betas if DeepSpeed's OneCycle schedule is used.
    """
    optimizer = wrapped.basic_optimizer
    cycled = {"betas"} if getattr(wrapped.lr_scheduler, "cycle_momentum", False) else set()
    names = optimizer.defaults.keys() - {"lr", *cycled}
    settings = [{name: group[name] for name in names} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _plain(value: object) -> object:
    """Return a copy of a state made of tensors, numbers, strings, lists and dicts only.

    A file with only these types can be loaded without running code from the file.
    """
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value.detach() if isinstance(value, Tensor) else value
