"""The folder of a training run: where its checkpoints lie, and how one comes into being whole.

``{save}/{experiment_name}-MM-DD-HH-MM/`` holds a folder for each saved iteration, ``latest`` with
the name of the newest, ``training_config.yaml``, and what watches the run; further runs of the same
minute have ``_2``, ``_3`` … after their names. A checkpoint is written into
``{iteration}.partial`` and renamed when it is complete, then ``latest`` changes: whenever the
process is killed, ``latest`` names a whole checkpoint.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from sgm.errors import UserError
from sgm.files import make_output_folder, replacing

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
EMA = "-ema"
_LONGEST_QUOTE = 60  # characters of a path that a message repeats


def is_main() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return distributed.get_rank() == 0


def start_run(args: Any) -> Path:
    """A new run's folder, made by rank 0; its name has the time, so the others ask for it.

    Raises:
        UserError: it cannot be made.
    """
    save = Path(args.save).expanduser()
    names = [""]
    if is_main():
        name = f"{args.experiment_name}-{datetime.now():%m-%d-%H-%M}"
        names = [_make_folder(make_output_folder(save), name)]
    distributed.broadcast_object_list(names, src=0, device=torch.device("cpu"))
    return save / names[0]


def _make_folder(save: Path, name: str) -> str:
    """Make a folder of this name, or with a number after it, and return its name."""
    for number in itertools.count(1):
        own = name if number == 1 else f"{name}_{number}"
        try:
            (save / own).mkdir()
        except FileExistsError:  # of a run that was started in the same minute
            continue
        except OSError as error:
            raise UserError(
                f"{save / own} cannot be made ({error.strerror}); change experiment_name"
            ) from None
        return own


def find_checkpoint(args: Any) -> Path:
    """The folder of the iteration that `resume` means.

    Raises:
        UserError: there is none; says where it was looked for.
    """
    try:
        return _find_checkpoint(args)
    except OSError as error:  # a name that is too long, a folder of somebody else …
        raise UserError(
            f"resume: {args.resume[:_LONGEST_QUOTE]} cannot be looked up ({error.strerror}); check "
            "the path and its permissions"
        ) from None


def _find_checkpoint(args: Any) -> Path:
    if args.resume != "latest":
        return _checkpoint_in(Path(args.resume).expanduser(), args.resume)
    save = Path(args.save).expanduser()
    # With the time in full: to the experiment "a" belongs no run of "a-b".
    name = re.compile(re.escape(args.experiment_name) + r"(-\d\d){4}(_\d+)?")
    runs = [path.parent for path in save.glob("*/latest") if name.fullmatch(path.parent.name)]
    if not runs:
        raise UserError(
            f"resume: latest: no run named {args.experiment_name}-… in {save} has a checkpoint; "
            "check save and experiment_name, or start without --resume"
        )
    newest = max(runs, key=lambda run: (run / "latest").stat().st_mtime_ns)
    return _checkpoint_in(newest, args.resume)


def _checkpoint_in(folder: Path, given: str) -> Path:
    if (folder / "latest").is_file():
        folder = folder / (folder / "latest").read_text("utf-8", errors="replace").strip()
    # A path with a newline or NUL in it, from a damaged `latest`, is no folder either.
    if not folder.name.isdecimal() or not folder.is_dir():
        raise UserError(
            f"resume: {given}: {folder} is no checkpoint of a run; name the run's folder (with the "
            "file 'latest' in it) or the folder of one of its iterations"
        )
    return folder


def clear_partial(run: Path) -> None:
    """Remove what a killed process left half written."""
    for path in run.glob(f"*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def new_partial(run: Path, name: str) -> Path:
    """A folder to write the checkpoint `name` into, made by rank 0; all processes must call it.

    Raises:
        UserError: it cannot be made.
    """
    folder = run / f"{name}{PARTIAL}"
    if is_main():
        make_output_folder(folder)
    distributed.barrier()
    return folder


def publish(run: Path, *names: str) -> None:
    """Give complete checkpoints their names; rank 0 calls it when all processes are done.

    `names` are those of one iteration: its moving average if there is one, and its weights.
    """
    average = f"{names[-1]}{EMA}"
    if average not in names:  # one that is there is not of these weights
        _remove(run / average)
    for name in names:
        target = run / name
        # One of a run that was resumed further back. `latest` may name it still, so that the new
        # one takes its place at once; deleting takes time.
        old = _set_aside(target) if target.exists() else None
        os.replace(run / f"{name}{PARTIAL}", target)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def point_latest(run: Path, iteration: int) -> None:
    """Make ``latest`` name `iteration`."""
    with replacing(run / "latest") as partial:
        partial.write_text(str(iteration), "utf-8")


def prune(run: Path, limit: int, *, up_to: int) -> None:
    """Keep the newest `limit` checkpoints up to the iteration `up_to`; 0 keeps all."""
    saved = [path for path in run.iterdir() if path.name.isdecimal() and int(path.name) <= up_to]
    saved.sort(key=lambda path: int(path.name))
    for path in saved[:-limit] if limit else []:
        for old in (path, run / f"{path.name}{EMA}"):
            _remove(old)


def _remove(folder: Path) -> None:
    """Delete a folder, if it is there."""
    if folder.exists():
        shutil.rmtree(_set_aside(folder), ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Rename what is to be deleted: a folder under its own name is whole or not there at all."""
    doomed = folder.with_name(f"{folder.name}.old{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    return doomed


def save_config(config: Any, run: Path) -> None:
    """Write ``training_config.yaml``, which says all that the run was started with.

    Raises:
        UserError: it cannot be written.
    """
    from omegaconf import OmegaConf

    sections = {"model": config.model, "data": config.data, "deepspeed": config.deepspeed}
    with replacing(run / "training_config.yaml") as partial:
        OmegaConf.save(OmegaConf.create({"args": vars(config.args), **sections}), partial)
