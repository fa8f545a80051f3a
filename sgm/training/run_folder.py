"""Manage the folder of a training run: its checkpoints, its configuration, and its lock.

``{save}/{experiment_name}-MM-DD-HH-MM/`` contains a folder for each saved iteration, the file
``latest`` with the name of the newest iteration, ``training_config.yaml``, and the metrics and
videos of the run. If several runs start in the same minute, ``_2``, ``_3`` … is appended to their
names.

A checkpoint is written to ``{iteration}.partial``, which is renamed when it is complete. After that
``latest`` is updated. If a run is resumed at an earlier iteration, ``latest`` is set to this
iteration, and later iterations are renamed to ``{iteration}.old`` and deleted after the next save.
``latest`` always names a complete checkpoint, so a killed process loses only its unsaved steps.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import re
import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO

import torch
from torch import distributed

from sgm.checkpoint.find import looking_up
from sgm.config import Config, TrainingArgs, read_yaml
from sgm.distributed import is_main
from sgm.errors import UserError, first_of
from sgm.files import expanded, make_output_folder, replacing

logger = logging.getLogger(__name__)


PARTIAL = ".partial"  # a checkpoint that is being written
OLD = ".old"  # a checkpoint that will be deleted after the next save
_LOCK = ".lock"
CONFIG_FILE = "training_config.yaml"
EMA = "-ema"


def start_run(args: TrainingArgs) -> Path:
    """Create the folder of a new run on rank 0 and return it on all ranks.

    Raises:
        UserError: the folder cannot be created, or another machine does not see it.
    """
    save = expanded(args.save)
    names = [""]
    if is_main():  # the name contains the time, and clocks differ between machines
        make_output_folder(save)
        names = [_make_folder(save, f"{args.experiment_name}-{datetime.now():%m-%d-%H-%M}")]
    distributed.broadcast_object_list(names, src=0, device=torch.device("cpu"))
    folder = save / names[0]
    if not folder.is_dir():
        raise UserError(
            f"{folder} was created by the first process but does not exist for process "
            f"{distributed.get_rank()}; set save to a folder that all machines share"
        )
    return folder


def _make_folder(save: Path, name: str) -> str:
    """Create the folder `name` in `save`, with a number appended if needed; return its name."""
    own = name
    for number in itertools.count(2):
        with suppress(FileExistsError):  # by a run started in the same minute
            (save / own).mkdir()
            break
        own = f"{name}_{number}"
    return own


def reserve(run: Path) -> IO[str] | None:
    """Lock a run for this process, and delete partial checkpoints that a killed process left.

    All processes must call this; rank 0 does the work. The lock is held while the returned file is
    open, at most until the process ends.

    Returns:
        On rank 0 the lock file, which is unlocked if the file system does not support locks. None
        on other ranks.

    Raises:
        UserError: another process is training the run, or the folder is not writable.
    """
    file = None
    if is_main():
        make_output_folder(run)
        file = (run / _LOCK).open("w")
        try:
            # Do not use flock: worker processes would hold the lock after this process was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{run} is being trained by another process; wait until it ends, or start a new run"
            ) from None
        except OSError:  # the file system does not support locks
            pass
        for path in run.glob(f"*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)
    distributed.barrier()
    return file


def find_checkpoint(args: TrainingArgs) -> Path:
    """Return the folder of the iteration to resume from, which `args.resume` names.

    Raises:
        UserError: there is no checkpoint; the message names the folder that was searched.
    """
    given = str(args.resume)
    with looking_up(given, "resume"):
        folder = _newest_run(args) if given == "latest" else expanded(given)
        latest = folder / "latest"
        name = latest.read_text("utf-8", errors="replace").strip() if latest.is_file() else ""
        if name:
            folder = folder / name
        elif folder.is_dir():  # after a power failure `latest` may be empty or missing
            folder = [folder, *_checkpoints(folder)][-1]
        # A damaged `latest` may contain a newline or NUL; `is_dir` is False for such a path, too.
        if folder.name.isdecimal() and folder.is_dir():
            return folder
    raise UserError(
        f"resume: {folder} is not a checkpoint of a run; name the folder of a run with saved "
        "checkpoints, or one checkpoint in it, or start without --resume"
    )


def _newest_run(args: TrainingArgs) -> Path:
    """Return the run of this experiment that saved last; raise UserError if none has saved."""
    save = expanded(args.save)
    # The pattern includes the time because the runs of experiment "a-b" are not runs of "a".
    name = re.compile(re.escape(args.experiment_name) + r"(-\d\d){4}(_\d+)?")
    runs = [path.parent for path in save.glob("*/latest") if name.fullmatch(path.parent.name)]
    if not runs:
        raise UserError(
            f"resume: latest: no run named {args.experiment_name}-… in {save} has a checkpoint; "
            "check save and experiment_name, or start without --resume"
        )
    return max(runs, key=lambda run: (run / "latest").stat().st_mtime_ns)


def _checkpoints(run: Path) -> list[Path]:
    """Return the folders of the saved iterations, in ascending order."""
    saved = [path for path in run.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(saved, key=_iteration)


def _iteration(folder: Path) -> int:
    """Return the iteration of a checkpoint or moving average folder; -1 for other folders."""
    number = folder.name.removesuffix(EMA)
    return int(number) if number.isdecimal() else -1


def new_partial(run: Path, name: str) -> Path:
    """Create the folder for writing the checkpoint `name`; all processes must call this.

    Raises:
        UserError: the folder cannot be created.
    """
    folder = run / f"{name}{PARTIAL}"
    if is_main():
        make_output_folder(folder)
    distributed.barrier()
    return folder


def publish(run: Path, iteration: int, *, limit: int) -> None:
    """Make the partial checkpoint of `iteration` the latest checkpoint, then delete old ones.

    Only rank 0 calls this, after all processes have written their files.

    Args:
        run: the run's folder.
        iteration: the iteration. The folder with its moving average, if any, is renamed too.
        limit: the number of checkpoints to keep; 0 keeps all.
    """
    # Rename the folder of the weights last, because it marks the checkpoint as complete.
    for name in (f"{iteration}{EMA}", f"{iteration}"):
        if (run / f"{name}{PARTIAL}").is_dir():
            os.replace(run / f"{name}{PARTIAL}", run / name)
    _point_latest(run, iteration)
    for path in _checkpoints(run)[:-limit] if limit else []:
        _set_aside(path)
        _set_aside(run / f"{path.name}{EMA}")
    for old in run.glob(f"*{OLD}"):
        shutil.rmtree(old, ignore_errors=True)


def _point_latest(run: Path, iteration: int) -> None:
    with replacing(run / "latest") as partial:
        partial.write_text(str(iteration), "utf-8")


def _set_aside(folder: Path) -> None:
    """Append `OLD` to the name of a folder, if the folder exists.

    Folders are renamed before they are deleted, so a folder without the suffix is complete.
    """
    if folder.is_dir():
        old = folder.with_name(f"{folder.name}{OLD}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)


def set_aside_later(checkpoint: Path) -> None:
    """Rename each iteration N after `checkpoint` to ``N.old``; the run resumes at `checkpoint`.

    The resumed run will save these iterations again. The next `publish` deletes the renamed ones.
    """
    run, start = checkpoint.parent, int(checkpoint.name)
    later = [path for path in run.iterdir() if path.is_dir() and _iteration(path) > start]
    if not later:
        return
    _point_latest(run, start)  # first, because `latest` must always name an existing folder
    numbers = sorted({_iteration(path) for path in later})
    for path in later:
        _set_aside(path)
    logger.warning(
        "the run is resumed at step %d; its later checkpoints (%s) are renamed to N%s, and deleted "
        "after the next save",
        *(start, first_of(list(map(str, numbers))), OLD),
    )


def compare_with_last_start(config: Config, run: Path) -> None:
    """Compare `config` with the configuration of the run's last start; warn about differences.

    The warning is needed because some keys of `model`, such as `scale_factor`, change the model
    without any error. Nothing is compared if the run's configuration cannot be read.

    Raises:
        UserError: the precision differs, so the optimizer's state cannot be loaded.
    """
    from sgm.training.deepspeed_settings import weight_dtype

    try:
        before, _ = read_yaml([str(run / CONFIG_FILE)])
    except UserError:
        return
    model = before["model"]
    changed = [key for key in model | config.model if model.get(key) != config.model.get(key)]
    precision = weight_dtype(before["deepspeed"])
    if precision != weight_dtype(config.deepspeed):
        raise UserError(
            f"resume: {run} was trained in {str(precision)[6:]}; use the section deepspeed of "
            f"{CONFIG_FILE} in that folder, or start a new run"
        )
    if changed and is_main():
        logger.warning(
            "these keys of the section model have changed since the run's last start: %s; see %s",
            *(", ".join(changed), run / CONFIG_FILE),
        )


def save_config(config: Config, run: Path) -> None:
    """Write all settings of the run to ``training_config.yaml``.

    Raises:
        UserError: the file cannot be written.
    """
    from omegaconf import OmegaConf

    sections = {"model": config.model, "data": config.data, "deepspeed": config.deepspeed}
    with replacing(run / CONFIG_FILE) as partial:
        OmegaConf.save(OmegaConf.create({"args": vars(config.args), **sections}), partial)
