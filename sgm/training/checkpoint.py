"""Saving a run so that inference can load its weights and training can go on from it bit for bit.

``{iteration}/mp_rank_00_model_states.pt`` holds the weights, in the layout that `load` and `lora`
read; ``{iteration}-ema`` the same for the moving average, in float32. Beside the weights lie
``training_state.pt`` (counters, schedule, and the optimizer where all processes hold the same) and,
where ZeRO divides the optimizer, ``optimizer_rank_NN.pt`` of every process. Random numbers need
no file: see `sgm.data.loader`.
"""

from __future__ import annotations

import contextlib
import enum
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from sgm.checkpoint.find import MODEL_FILES, Weights, find_transformer
from sgm.checkpoint.lora import lora_record
from sgm.checkpoint.reading import read_checkpoint, tensors_of
from sgm.checkpoint.strict_loading import check_fit
from sgm.checkpoint.transformer import is_lora_matrix
from sgm.errors import UserError
from sgm.files import save_torch
from sgm.training import run_folder
from sgm.training.deepspeed_engine import WHAT_TO_DO, gathered
from sgm.training.ema import WeightAverage

logger = logging.getLogger(__name__)

WEIGHTS_FILE = MODEL_FILES[0]
STATE_FILE = "training_state.pt"
_STATE_KEYS = {"step", "samples", "processes", "schedule", "watched", "optimizer"}
_COUNTS = ("step", "samples", "processes")
_CONDITIONER = "conditioner."
_LOSS_SCALER = "loss_scaler"
# DeepSpeed's aids for other ways of loading than ours, made of its own classes.
_UNUSED_KEYS = ("param_slice_mappings", "universal_checkpoint_info")


@dataclass
class Progress:
    """How far a run is: optimizer steps, and samples of the stream that they have used."""

    step: int = 0
    samples: int = 0


class Checkpointer:
    """Saves a run and restores it.

    Args:
        wrapped: DeepSpeed's engine.
        run: the run's folder.
        average: the moving average of the weights, if there is one.
        watched: what else goes into the state, by name: objects with state_dict, which all
            processes call, and load_state_dict.
        limit: checkpoints that are kept; 0: all.
        base: `fingerprint` of the weights that training began with.
    """

    def __init__(
        self,
        wrapped: Any,
        run: Path,
        *,
        average: WeightAverage | None,
        watched: Mapping[str, Any],
        limit: int,
        base: str,
    ) -> None:
        self.wrapped = wrapped
        self.run = run
        self.average = average
        self.watched = watched
        self.limit = limit
        self.base = base
        self.divided = is_divided(wrapped.optimizer)

    def save(self, progress: Progress) -> None:
        """Write all of it, then make it the latest; all processes must call it.

        Raises:
            UserError: a file cannot be written, or a weight is not finite.
        """
        name = str(progress.step)
        folder = run_folder.new_partial(self.run, name)
        names = [name]
        self._write_weights(folder, averages=None)
        if self.average is not None:
            names.insert(0, f"{name}{run_folder.EMA}")
            self._write_weights(
                run_folder.new_partial(self.run, names[0]), averages=self.average.averages
            )
        if self.divided:
            rank = distributed.get_rank()
            save_torch(_plain(self._optimizer_state()), folder / _rank_file(rank))
        state = self._state(progress)
        if run_folder.is_main():
            save_torch(_plain(state), folder / STATE_FILE)
        distributed.barrier()
        if run_folder.is_main():
            run_folder.publish(self.run, *names)
            run_folder.point_latest(self.run, progress.step)
            run_folder.prune(self.run, self.limit, up_to=progress.step)
            logger.info("saved %s", self.run / name)
        distributed.barrier()

    def restore(self, folder: Path) -> Progress:
        """Take the state of the checkpoint in `folder`; its weights are in place already.

        Raises:
            UserError: a file is absent or damaged, or belongs to another number of processes or
                to other settings of DeepSpeed.
        """
        state = _read_state(folder / STATE_FILE)
        processes = distributed.get_world_size()
        if (state["optimizer"] is None) != self.divided:
            raise UserError(
                f"{folder} was saved with another stage of zero_optimization or another precision; "
                "set the deepspeed section as in training_config.yaml beside it"
            )
        if self.divided and state["processes"] != processes:
            raise UserError(
                f"{folder} was saved by {state['processes']} processes and ZeRO divided the "
                f"optimizer among them, but now there are {processes}; resume with "
                f"NPROC={state['processes']}, or start a new run with load: {folder}"
            )
        own = state["optimizer"]
        if self.divided:
            own = _read_state(folder / _rank_file(distributed.get_rank()))
        try:
            with _own_settings(self.wrapped):
                self._load_optimizer(own)
            self.wrapped.lr_scheduler.load_state_dict(state["schedule"])
            _catch_up(self.wrapped.lr_scheduler, state["schedule"])
            for name, part in self.watched.items():
                part.load_state_dict(state["watched"][name])
        except (KeyError, ValueError, RuntimeError, AssertionError, TypeError) as error:
            logger.debug("%s", folder, exc_info=True)
            reason = str(error).strip().splitlines() or [""]
            raise UserError(
                f"{folder} cannot be resumed ({type(error).__name__}: {reason[0]}); what is "
                "trained and the deepspeed section must be as in training_config.yaml beside it"
            ) from None
        if self.average is not None:
            self._restore_average(folder)
        self.wrapped.global_steps = state["step"]
        return Progress(step=state["step"], samples=state["samples"])

    def _state(self, progress: Progress) -> dict[str, Any]:
        return {
            "step": progress.step,
            "samples": progress.samples,
            "processes": distributed.get_world_size(),
            "schedule": self.wrapped.lr_scheduler.state_dict(),
            "watched": {name: part.state_dict() for name, part in self.watched.items()},
            "optimizer": None if self.divided else self._optimizer_state(),
        }

    def _write_weights(self, folder: Path, *, averages: Mapping[str, Tensor] | None) -> None:
        """The weights as they are, or with `averages` in the place of those that are averaged."""
        weights = trained_weights(self.wrapped.module)
        is_lora = trains_lora(self.wrapped.module)
        if not is_lora:
            weights = dict(self.wrapped.module.named_parameters())
        module = {}
        for name, weight in weights.items():
            with gathered(self.wrapped, [weight]):
                if run_folder.is_main():
                    source = (averages or {}).get(name, weight).detach()
                    _check_finite(name, source)
                    module[name] = source.to("cpu", copy=True)
        if run_folder.is_main():
            network = self.wrapped.module.model.diffusion_model
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
        # DeepSpeed wants the states of all processes and takes its own; one of its optimizers
        # prints while it does so.
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer.load_state_dict({distributed.get_rank(): state}, load_from_fp32_weights=True)

    def _restore_average(self, folder: Path) -> None:
        path = folder.with_name(f"{folder.name}{run_folder.EMA}") / WEIGHTS_FILE
        if not path.is_file():
            raise UserError(
                f"{path} does not exist, so the moving average cannot be gone on with; resume with "
                "ema_decay 0"
            )
        module = tensors_of(read_checkpoint(path), path, wrapper="module")
        averages = self.average.averages
        found = {name: tensor for name, tensor in module.items() if name in averages}
        hint = "resume from another iteration, or with ema_decay 0"
        check_fit(found, averages, path=path, hint=hint, model="what is trained")
        self.average.load(found)


def trained_weights(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights of a module that are trained, by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def trains_lora(module: torch.nn.Module) -> bool:
    """Whether of a module's weights the matrices of a LoRA only are trained, and so saved."""
    return all(is_lora_matrix(name) for name in trained_weights(module))


def holds_lora(checkpoint: Weights) -> bool:
    """Whether a run's checkpoint holds the matrices of a LoRA only.

    Raises:
        UserError: its file of weights cannot be read.
    """
    (file,) = checkpoint.files
    state = file.read().state
    return isinstance(state, Mapping) and "lora" in state


def check_conditioner(engine: Any, checkpoint: Weights) -> dict[str, Tensor]:
    """The text encoder's weights in a run's checkpoint, which holds them if they were trained.

    Raises:
        UserError: they are not those of this text encoder.
    """
    (file,) = checkpoint.files
    module = file.tensors(wrapper="module")
    stored = {name: tensor for name, tensor in module.items() if name.startswith(_CONDITIONER)}
    if stored:
        own = {n: w for n, w in engine.named_parameters() if n.startswith(_CONDITIONER)}
        hint = "use the text encoder that the run was started with"
        check_fit(stored, own, path=checkpoint.path, hint=hint)
    return stored


def restore_conditioner(engine: Any, stored: Mapping[str, Tensor]) -> None:
    """Take the text encoder's weights from what `check_conditioner` returned."""
    own = dict(engine.named_parameters())
    with torch.no_grad():
        for name, tensor in stored.items():
            own[name].copy_(tensor)


def _check_finite(name: str, weight: Tensor) -> None:
    """Keep weights that nobody can go on from out of checkpoints, which push older ones out."""
    if not weight.isfinite().all():
        raise UserError(
            f"the weight {name} is not finite any more, so nothing is saved; {WHAT_TO_DO}"
        )


def is_divided(optimizer: Any) -> bool:
    """Whether each process holds its own part of the optimizer."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    return isinstance(optimizer, ZeROOptimizer)


@contextlib.contextmanager
def _own_settings(wrapped: Any) -> Iterator[None]:
    """Within it an optimizer's state may be loaded; what it was built with (betas, …) stays.

    But for what follows from the schedule: the learning rate, and in DeepSpeed's OneCycle betas.
    """
    optimizer = wrapped.basic_optimizer
    cycled = {"betas"} if getattr(wrapped.lr_scheduler, "cycle_momentum", False) else set()
    names = optimizer.defaults.keys() - {"lr", *cycled}
    settings = [{name: group[name] for name in names} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _rank_file(rank: int) -> str:
    return f"optimizer_rank_{rank:02d}.pt"


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        load = path.parent
        if holds_lora(find_transformer(path.parent)):
            load = f"what tools/merge_lora.py makes of the base model and {path.parent}"
        raise UserError(
            f"{path} does not exist, so the run cannot be gone on with; start a new one with "
            f"load: {load}"
        )
    state = read_checkpoint(path)
    keys, counts = (_STATE_KEYS, _COUNTS) if path.name == STATE_FILE else (set(), ())
    is_whole = isinstance(state, Mapping) and not keys - state.keys()
    if not is_whole or not all(_is_count(state[key]) for key in counts):
        raise UserError(
            f"{path} is not what a run saves for itself; resume from another checkpoint"
        )
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _catch_up(schedule: Any, state: Mapping[str, Any]) -> None:
    """Set SAT's schedule to the step that it was saved at, which it does not do by itself."""
    if "num_iters" in state:
        schedule.step(state["num_iters"])


def _plain(value: Any) -> Any:
    """`value` with nothing in it but tensors, numbers, texts, lists and dicts.

    So the file can be read without running code from it.
    """
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value.detach() if isinstance(value, Tensor) else value
