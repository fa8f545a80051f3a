"""The folder of a training run: its checkpoints, its configuration, and its lock.

``{save}/{experiment_name}-MM-DD-HH-MM/`` holds a folder for each saved iteration, ``latest`` with
the name of the newest one, ``training_config.yaml``, and the metrics and videos of the run. Further
runs of the same minute have ``_2``, ``_3`` … after their names.

A checkpoint is written into ``{iteration}.partial`` and renamed when it is complete. Then
``latest`` changes. A run that is resumed at an earlier iteration points ``latest`` there, renames
later iterations to ``{iteration}.old``, and deletes these after its next save. At any moment
``latest`` names a complete checkpoint, so a killed process loses no more than its unsaved steps.
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
from sgm.files import make_output_folder, replacing

logger = logging.getLogger(__name__)


PARTIAL = ".partial"  # a checkpoint that is being written
OLD = ".old"  # a checkpoint that will be deleted after the next save
_LOCK = ".lock"
CONFIG_FILE = "training_config.yaml"
EMA = "-ema"


def start_run(args: TrainingArgs) -> Path:
    """Make the folder of a new run on rank 0 and return it on all ranks.

    Raises:
        UserError: the folder cannot be made, or another machine does not see it.
    """
    save = Path(args.save).expanduser()
    names = [""]
    if is_main():  # clocks differ between machines
        make_output_folder(save)
        names = [_make_folder(save, f"{args.experiment_name}-{datetime.now():%m-%d-%H-%M}")]
    distributed.broadcast_object_list(names, src=0, device=torch.device("cpu"))
    folder = save / names[0]
    if not folder.is_dir():
        raise UserError(
            f"{folder}, which the first process has made, is not there for process "
            f"{distributed.get_rank()}: save must be a folder that all machines share"
        )
    return folder


def _make_folder(save: Path, name: str) -> str:
    """Make a folder of this name, or with a number after it, and return its name."""
    own = name
    with looking_up(name, "experiment_name"):  # which may be too long
        for number in itertools.count(2):
            with suppress(FileExistsError):  # of a run that was started in the same minute
                (save / own).mkdir()
                break
            own = f"{name}_{number}"
    return own


def reserve(run: Path) -> IO[str] | None:
    """Lock a run for this training, and delete partial checkpoints of a killed process.

    All processes must call it; rank 0 does the work. The lock is held while the returned file is
    open, at most until the process ends.

    Returns:
        The file, which is not locked if its file system has no locks; None on other ranks.

    Raises:
        UserError: another process trains the run, or its folder cannot be written to.
    """
    file = None
    if is_main():
        make_output_folder(run)
        file = (run / _LOCK).open("w")
        try:
            # Not flock: worker processes would keep its lock after this process was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{run} is being trained by another process; wait for its end, or start a new run"
            ) from None
        except OSError:  # the file system has no locks
            pass
        for path in run.glob(f"*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)
    distributed.barrier()
    return file


def find_checkpoint(args: TrainingArgs) -> Path:
    """The folder of the iteration that `args.resume` names.

    Raises:
        UserError: there is no checkpoint; the message says where it was expected.
    """
    given = str(args.resume)
    with looking_up(given, "resume"):
        folder = _newest_run(args) if given == "latest" else Path(given).expanduser()
        latest = folder / "latest"
        name = latest.read_text("utf-8", errors="replace").strip() if latest.is_file() else ""
        if name:
            folder = folder / name
        elif folder.is_dir():  # `latest` is empty after a power failure, or not yet written
            folder = [folder, *_checkpoints(folder)][-1]
        # A damaged `latest` may hold a newline or NUL; such a path is not a folder either.
        if folder.name.isdecimal() and folder.is_dir():
            return folder
    raise UserError(
        f"resume: {folder} is not a checkpoint of a run; name the folder of a run that has saved "
        "one, or of one of its iterations, or start without --resume"
    )


def _newest_run(args: TrainingArgs) -> Path:
    """The run of this experiment that saved last; raises UserError if there is none."""
    save = Path(args.save).expanduser()
    # The pattern includes the time: the runs of experiment "a-b" do not belong to experiment "a".
    name = re.compile(re.escape(args.experiment_name) + r"(-\d\d){4}(_\d+)?")
    runs = [path.parent for path in save.glob("*/latest") if name.fullmatch(path.parent.name)]
    if not runs:
        raise UserError(
            f"resume: latest: no run named {args.experiment_name}-… in {save} has a checkpoint; "
            "check save and experiment_name, or start without --resume"
        )
    return max(runs, key=lambda run: (run / "latest").stat().st_mtime_ns)


def _checkpoints(run: Path) -> list[Path]:
    """The folders of the saved iterations, in ascending order."""
    saved = [path for path in run.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(saved, key=_iteration)


def _iteration(folder: Path) -> int:
    """The iteration of a checkpoint or of its moving average; -1 for another folder."""
    number = folder.name.removesuffix(EMA)
    return int(number) if number.isdecimal() else -1


def new_partial(run: Path, name: str) -> Path:
    """Make a folder on rank 0 to write the checkpoint `name` into; all processes must call it.

    Raises:
        UserError: it cannot be made.
    """
    folder = run / f"{name}{PARTIAL}"
    if is_main():
        make_output_folder(folder)
    distributed.barrier()
    return folder


def publish(run: Path, iteration: int, *, limit: int) -> None:
    """Turn the partial checkpoint of `iteration` into the latest one, then delete old ones.

    Rank 0 calls it when all processes have written their files.

    Args:
        run: the run's folder.
        iteration: the iteration. Its moving average is published with it.
        limit: the number of checkpoints to keep; 0 keeps all.
    """
    # The weights come last: with them the checkpoint is complete.
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
    """Rename a folder to its name with `OLD`, if it exists.

    Folders are renamed before they are deleted, so a folder with its own name is complete.
    """
    if folder.is_dir():
        old = folder.with_name(f"{folder.name}{OLD}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)


def set_aside_later(checkpoint: Path) -> None:
    """Rename the iterations after `checkpoint`, at which the run is resumed, to ``N.old``.

    The run will save these iterations again. `publish` deletes the old ones after its next save.
    """
    run, start = checkpoint.parent, int(checkpoint.name)
    later = [path for path in run.iterdir() if path.is_dir() and _iteration(path) > start]
    if not later:
        return
    _point_latest(run, start)  # first, so that `latest` always names a folder that exists
    numbers = sorted({_iteration(path) for path in later})
    for path in later:
        _set_aside(path)
    logger.warning(
        "the run is resumed at step %d; its later checkpoints (%s) are renamed to N%s and deleted "
        "after the next save",
        *(start, first_of(list(map(str, numbers))), OLD),
    )


def compare_with_last_start(config: Config, run: Path) -> None:
    """Compare a configuration with the one of the run's last start, and warn of differences.

    Some keys of `model`, such as `scale_factor`, change the model without any error. Nothing is
    logged if the run's configuration cannot be read.

    Raises:
        UserError: the precision differs, so the optimizer's state does not fit.
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
            f"resume: {run} was trained in {str(precision)[6:]}; set the precision in the section "
            f"deepspeed as in {CONFIG_FILE} there, or start a new run"
        )
    if changed and is_main():
        logger.warning(
            "this run was last started with other settings in the section model: %s; compare %s",
            *(", ".join(changed), run / CONFIG_FILE),
        )


def save_config(config: Config, run: Path) -> None:
    """Write ``training_config.yaml`` with all settings that the run was started with.

    Raises:
        UserError: it cannot be written.
    """
    from omegaconf import OmegaConf

    sections = {"model": config.model, "data": config.data, "deepspeed": config.deepspeed}
    with replacing(run / CONFIG_FILE) as partial:
        OmegaConf.save(OmegaConf.create({"args": vars(config.args), **sections}), partial)
