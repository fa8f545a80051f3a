"""The folder of a training run: where its checkpoints lie, and how one comes into being whole.

``{save}/{experiment_name}-MM-DD-HH-MM/`` holds a folder for each saved iteration, ``latest`` with
the name of the newest, ``training_config.yaml``, and what watches the run; further runs of the same
minute have ``_2``, ``_3`` … after their names. A checkpoint is written into
``{iteration}.partial`` and renamed when it is complete, then ``latest`` changes: whenever the
process is killed, ``latest`` names a whole checkpoint.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch
from torch import distributed

from sgm.distributed import is_main
from sgm.errors import UserError
from sgm.files import make_output_folder, replacing

logger = logging.getLogger(__name__)


PARTIAL = ".partial"
_DOOMED = f".old{PARTIAL}"  # of what is being deleted
_REPLACED = f".replaced{PARTIAL}"  # of a whole checkpoint whose place another one takes
_LOCK = ".lock"
CONFIG_FILE = "training_config.yaml"
EMA = "-ema"
# What reading such a file may raise, or its content where it is not as it was written.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError)
_LONGEST_QUOTE = 60  # characters of a path that a message repeats


def start_run(args: Any) -> Path:
    """A new run's folder, made by rank 0; its name has the time, so the others ask for it.

    Raises:
        UserError: it cannot be made, or another machine does not see it.
    """
    save = Path(args.save).expanduser()
    names = [""]
    if is_main():
        name = f"{args.experiment_name}-{datetime.now():%m-%d-%H-%M}"
        names = [_make_folder(make_output_folder(save), name)]
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


def reserve(run: Path) -> IO[str] | None:
    """Take a run for this training alone, and clear up what a killed process left in it.

    All processes must call it; rank 0 does the work. The run is taken as long as the file returned
    is open, at most until the process ends, however that ends. On other ranks, and on a disk
    without locks, there is no file.

    Raises:
        UserError: another process trains it, or it cannot be written to.
    """
    file = None
    if is_main():
        make_output_folder(run)
        file = (run / _LOCK).open("w")
        try:
            # Not flock, which worker processes would hold on to after this one was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{run} is being trained by another process; wait for its end, or start a new run"
            ) from None
        except OSError as error:
            logger.debug("%s cannot be locked: %s", run, error)
            file = None
        _clear_partial(run)
    distributed.barrier()
    return file


def find_checkpoint(args: Any) -> Path:
    """The folder of the iteration that `resume` means; it is whole after `reserve`.

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
    latest = ""  # which it also is after the machine went down
    if (folder / "latest").is_file():
        latest = (folder / "latest").read_text("utf-8", errors="replace").strip()
    if latest:
        folder = folder / latest
    elif (folder / CONFIG_FILE).is_file():  # a run that was ended before `latest` was there
        saved = _checkpoints(folder)
        if not saved:
            raise UserError(
                f"resume: {folder}: nothing is saved there yet; if that run has ended, start it "
                "anew, without --resume"
            )
        folder = saved[-1]
    # A path with a newline or NUL in it, from a damaged `latest`, is no folder either.
    aside = folder.parent / f"{folder.name}{_REPLACED}"  # see `reserve`
    if not folder.name.isdecimal() or not (folder.is_dir() or aside.is_dir()):
        raise UserError(
            f"resume: {_quoted(given, folder)} is no checkpoint of a run; name the run's folder "
            "(with the file 'latest' in it) or the folder of one of its iterations"
        )
    return folder


def _quoted(given: str, folder: Path) -> str:
    """A path as it was given, and where that led."""
    return str(folder) if folder == Path(given).expanduser() else f"{given}: {folder}"


def _clear_partial(run: Path) -> None:
    for aside in run.glob(f"*[0-9]{_REPLACED}"):
        _put_back(run / aside.name.removesuffix(_REPLACED))
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
    iteration = names[-1]
    # Those of a run that was resumed further back. `latest` may name them still, so that they are
    # not deleted before the new ones are there: whoever is killed in between gets them back.
    old = [_set_aside(run / name, _REPLACED) for name in (iteration, f"{iteration}{EMA}")]
    for name in names:
        os.replace(run / f"{name}{PARTIAL}", run / name)
    for folder in old:
        shutil.rmtree(folder, ignore_errors=True)


def point_latest(run: Path, iteration: int) -> None:
    """Make ``latest`` name `iteration`."""
    with replacing(run / "latest") as partial:
        partial.write_text(str(iteration), "utf-8")


def prune(run: Path, limit: int, *, up_to: int) -> None:
    """Keep the newest `limit` checkpoints up to the iteration `up_to`; 0 keeps all."""
    saved = [path for path in _checkpoints(run) if int(path.name) <= up_to]
    for path in saved[:-limit] if limit else []:
        for old in (path, run / f"{path.name}{EMA}"):
            shutil.rmtree(_set_aside(old, _DOOMED), ignore_errors=True)


def _set_aside(folder: Path, suffix: str) -> Path:
    """Rename what is to be deleted: a folder under its own name is whole or not there at all.

    Nothing happens if it is not there.
    """
    aside = folder.with_name(f"{folder.name}{suffix}")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.replace(folder, aside)
    return aside


def _put_back(checkpoint: Path) -> None:
    """Undo a `publish` that was killed after it had set a checkpoint aside."""
    for name in (f"{checkpoint.name}{EMA}", checkpoint.name):  # the weights last: then it is whole
        aside = checkpoint.with_name(f"{name}{_REPLACED}")
        if not os.path.lexists(checkpoint) and aside.is_dir():
            shutil.rmtree(checkpoint.with_name(name), ignore_errors=True)
            os.replace(aside, checkpoint.with_name(name))


def warn_of_what_stays(checkpoint: Path, *, averages: bool) -> None:
    """Name what a run that goes on from `checkpoint` has, but will not go on with.

    Args:
        checkpoint: the folder of an iteration.
        averages: whether there will be a moving average.
    """
    iteration, run = int(checkpoint.name), checkpoint.parent
    if not averages and (run / f"{iteration}{EMA}").is_dir():
        logger.warning(
            "%s has a moving average, which ends here, as ema_decay is 0; to go on with it give "
            "--ema-decay as before",
            run,
        )
    later = [path.name for path in _checkpoints(run) if int(path.name) > iteration]
    if later:
        logger.warning(
            "what was saved after step %d stays (%d of it, up to step %s) until this run saves "
            "the same steps or save_total_limit is reached; latest will name what it saves",
            *(iteration, len(later), later[-1]),
        )


def _checkpoints(run: Path) -> list[Path]:
    """The folders of the iterations that a run has saved, in their order."""
    saved = [path for path in run.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(saved, key=lambda path: int(path.name))


def compare_with_last_start(config: Any, run: Path) -> None:
    """Tell what is otherwise than when the run was last started, as far as it matters.

    Some keys of `model` make another model of the weights without any other sign, such as
    `scale_factor`. Nothing is said where the run's configuration cannot be read.

    Raises:
        UserError: the precision is another one, in which the optimizer's state is not.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from sgm.training.preflight import weight_dtype

    try:
        before = OmegaConf.to_container(OmegaConf.load(run / CONFIG_FILE))
        changed = list(_differing_keys(before["model"], config.model, "model"))
        precision = weight_dtype(before.get("deepspeed") or {})
    except (*_UNREADABLE, YAMLError, OmegaConfBaseException) as error:
        logger.debug("%s of %s cannot be compared: %s", CONFIG_FILE, run, error)
        return
    now = weight_dtype(config.deepspeed)
    if precision != now:
        raise UserError(
            f"resume: {run} was trained in {str(precision)[6:]}, and the section deepspeed asks "
            f"for {str(now)[6:]}; set it as in {CONFIG_FILE} there, or start a new run"
        )
    if changed and is_main():
        logger.warning(
            "this run was last started with other settings: %s; compare %s",
            *(", ".join(changed), run / CONFIG_FILE),
        )


def _differing_keys(one: Any, other: Any, key: str) -> Iterator[str]:
    """Dotted keys at which two sections differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in dict.fromkeys([*one, *other]):
            yield from _differing_keys(one.get(name), other.get(name), f"{key}.{name}")
    elif one != other:
        yield key


def save_config(config: Any, run: Path) -> None:
    """Write ``training_config.yaml``, which says all that the run was started with.

    Raises:
        UserError: it cannot be written.
    """
    from omegaconf import OmegaConf

    sections = {"model": config.model, "data": config.data, "deepspeed": config.deepspeed}
    with replacing(run / CONFIG_FILE) as partial:
        OmegaConf.save(OmegaConf.create({"args": vars(config.args), **sections}), partial)
