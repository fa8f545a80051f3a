"""Checkpoints of a training run: saving, and resuming with the same result to the bit.

``{iteration}/mp_rank_00_model_states.pt`` holds the weights, in the layout that `load` and `lora`
read; ``{iteration}-ema`` holds the same for the moving average, in float32. Beside the weights are
``training_state.pt`` (counters, schedule, and the optimizer if all processes hold the same one)
and, if ZeRO divides the optimizer, ``optimizer_rank_NN.pt`` of each process. The state of random
numbers is not saved: each sample and step has its own seed, see `sgm.data.loader`.
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
# DeepSpeed adds these objects for its own ways of loading, which are not used here.
_UNUSED_KEYS = ("param_slice_mappings", "universal_checkpoint_info")


class _State(Section):
    """The contents of ``training_state.pt``; `optimizer` is None if ZeRO divides it."""

    step: int = Field(ge=0)
    samples: int = Field(ge=0)
    processes: int = Field(ge=1)
    schedule: dict[str, Any]
    watched: dict[str, dict[str, Any]]
    optimizer: dict[str, Any] | None


@dataclass
class TrainingProgress:
    """Progress of a run: optimizer steps done, and samples of the stream that they have used."""

    step: int = 0
    samples: int = 0


@dataclass(kw_only=True)
class Checkpointer:
    """Saves a run and restores it.

    Args:
        wrapped: DeepSpeed's engine.
        run: the run's folder.
        average: the moving average of the weights, if there is one.
        report: its sums of losses are saved too.
        limit: number of checkpoints to keep; 0 keeps all.
        base: `fingerprint` of the weights that training began with.
    """

    wrapped: DeepSpeedEngine
    run: Path
    average: WeightAverage | None
    report: Report
    limit: int
    base: str | None

    def __post_init__(self) -> None:
        from deepspeed.runtime.base_optimizer import ZeROOptimizer

        # Whether each process holds its own part of the optimizer.
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
            "watched": {"report": self.report.state_dict()},  # all processes take part
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
        """Restore the state in a checkpoint's folder; the weights must be loaded already.

        Raises:
            UserError: a file is missing or damaged, or belongs to another number of processes or
                to other settings of DeepSpeed.
        """
        path = folder / STATE_FILE
        try:
            state = _State.model_validate(read_checkpoint(path))
        except ValidationError:
            raise UserError(f"{path} is not the state of a run; resume from another one") from None
        processes = distributed.get_world_size()
        if (state.optimizer is None) != self.divided:
            raise UserError(
                f"{folder} was saved with another stage of zero_optimization or another precision; "
                "set the deepspeed section as in training_config.yaml beside it"
            )
        if self.divided and state.processes != processes:
            raise UserError(
                f"{folder} was saved by {state.processes} processes and ZeRO divided the optimizer "
                f"among them, but now there are {processes}; resume with NPROC={state.processes}, "
                f"or start a new run with load: {folder}"
            )
        optimizer: Any = state.optimizer
        if self.divided:
            optimizer = read_checkpoint(folder / _RANK_FILE.format(distributed.get_rank()))
        try:
            with _kept_settings(self.wrapped):
                self._load_optimizer(optimizer)
            schedule = self.wrapped.lr_scheduler
            schedule.load_state_dict(state.schedule)
            if "num_iters" in state.schedule:  # SAT's schedule does not set itself to its step
                schedule.step(state.schedule["num_iters"])
            self.report.load_state_dict(state.watched["report"])
        except (KeyError, ValueError, RuntimeError, AssertionError, TypeError) as error:
            raise UserError(
                f"{folder} cannot be resumed ({reason_of(error)}); the trained weights and the "
                "deepspeed section must be as in training_config.yaml beside it"
            ) from error
        if self.average is not None:
            self._restore_average(self.average, folder.with_name(f"{folder.name}{run_folder.EMA}"))
        self.wrapped.global_steps = state.step
        return TrainingProgress(step=state.step, samples=state.samples)

    def _write_weights(self, folder: Path, *, averages: Mapping[str, Tensor]) -> None:
        """Write the weights; those with an average are replaced by it."""
        model, module = self.wrapped.module, {}
        is_lora = trains_lora(model)
        weights = trained_weights(model) if is_lora else dict(model.named_parameters())
        for name, weight in weights.items():
            with gathered(self.wrapped, [weight]):
                if not is_main():
                    continue
                source = averages.get(name, weight).detach()
                # Training cannot continue from such weights; older checkpoints are worth more.
                if not source.isfinite().all():
                    raise UserError(
                        f"the weight {name} is not finite any more, so nothing is saved; "
                        f"{NONFINITE_ADVICE}"
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
        # DeepSpeed takes a mapping of all ranks' states and uses its own rank's. One of its
        # optimizers prints while it loads.
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer.load_state_dict({distributed.get_rank(): state}, load_from_fp32_weights=True)

    def _restore_average(self, average: WeightAverage, folder: Path) -> None:
        """Load the moving average from its folder."""
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise UserError(
                f"{path} does not exist, so the moving average cannot be continued; resume with "
                "ema_decay 0"
            )
        module = tensors_of(read_checkpoint(path), path)
        averages = average.averages
        found = {name: tensor for name, tensor in module.items() if name in averages}
        hint = "resume from another iteration, or with ema_decay 0"
        check_fit(found, averages, path=path, hint=hint, model="what is trained")
        average.load(found)


def trains_lora(module: torch.nn.Module) -> bool:
    """Whether the trained weights of a module, which are saved, are LoRA matrices only."""
    return all(is_lora_matrix(name) for name in trained_weights(module))


def holds_lora(checkpoint: Weights) -> bool:
    """Whether a run's checkpoint holds LoRA matrices only.

    Raises:
        UserError: its file of weights cannot be read.
    """
    state = checkpoint.file.read().state
    return isinstance(state, Mapping) and "lora" in state


def check_conditioner(engine: SATVideoDiffusionEngine, checkpoint: Weights) -> dict[str, Tensor]:
    """The text encoder's weights in a run's checkpoint; empty if they were not trained.

    Raises:
        UserError: they do not fit this text encoder.
    """
    module = checkpoint.file.tensors()
    stored = {name: tensor for name, tensor in module.items() if name.startswith(_CONDITIONER)}
    if stored:
        own = {n: w for n, w in engine.named_parameters() if n.startswith(_CONDITIONER)}
        hint = "use the text encoder that the run was started with"
        check_fit(stored, own, path=checkpoint.path, hint=hint)
    return stored


def check_state_file(path: Path) -> None:
    """Check that a file of the state exists in a checkpoint's folder.

    Raises:
        UserError: it is missing, so only the weights beside it can be used.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist, so the run cannot be resumed; start a new one with load: "
            f"{path.parent} (if that is a LoRA: with the output of tools/merge_lora.py for it)"
        )


@contextlib.contextmanager
def _kept_settings(wrapped: DeepSpeedEngine) -> Iterator[None]:
    """Keep the optimizer's own settings (weight decay, …) while a state is loaded in the context.

    The learning rate, and betas in DeepSpeed's OneCycle, follow the schedule and are loaded.
    """
    optimizer = wrapped.basic_optimizer
    cycled = {"betas"} if getattr(wrapped.lr_scheduler, "cycle_momentum", False) else set()
    names = optimizer.defaults.keys() - {"lr", *cycled}
    settings = [{name: group[name] for name in names} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _plain(value: object) -> object:
    """Copy a state as tensors, numbers, texts, lists and dicts only.

    A file of these can be read without running code from it.
    """
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value.detach() if isinstance(value, Tensor) else value
