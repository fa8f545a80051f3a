"""Where a run's figures go besides the log: TensorBoard's files, and Weights & Biases."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from sgm.errors import UserError
from sgm.files import make_output_folder, replacing

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Keeps curves of numbers over steps."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add a point to each curve; ``group/name`` is a curve's name."""

    def close(self) -> None:
        """Finish; nothing is logged after it."""


class TensorBoard:
    """Event files that ``tensorboard --logdir`` shows.

    Written by the caller's own thread and on disk when `log` returns: tensorboardX's usual writer
    has a thread and a queue, and on a full disk the thread dies and the queue blocks the training.

    Args:
        folder: made if it is not there.
        start_step: step that the run goes on from; points after it, of a process that was killed
            before their step was saved, are hidden.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, start_step: int = 0) -> None:
        self.folder = make_output_folder(folder)
        # The writer's own name has the second of the start only.
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if start_step > 0:
            session = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=start_step + 1, session_log=session))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one event with all `scalars`."""
        event = Event(wall_time=time.time(), step=step)
        for name, value in scalars.items():
            # TensorBoard's names have no spaces.
            event.summary.value.extend(scalar(name.replace(" ", "_"), value).value)
        self._write(event)

    def _write(self, event: Event) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:  # curves are not worth a run
            logger.warning("%s: %s; it is written no further", self.folder, error)
            self._writer = None

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()  # every event is on disk already
            self._writer = None


class WeightsAndBiases:
    """A run of Weights & Biases; wandb's environment variables (WANDB_MODE …) hold.

    Args:
        folder: the run's; its name is the name there. What tells the run apart is kept in it, so
            that one that is resumed goes on there too.
        project: of Weights & Biases.
        config: what the run was started with.

    Raises:
        UserError: wandb is not installed, not logged in or cannot start.
    """

    def __init__(self, folder: Path, *, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "wandb: true, but wandb is not installed; pip install wandb, or use --no-wandb"
            ) from None
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=_run_id(folder),
                resume="allow",
                dir=str(folder),
                config=dict(config),
            )
        except (wandb.Error, ValueError, OSError) as error:  # ValueError: a wrong variable
            logger.debug("wandb.init", exc_info=True)
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise UserError(
                f"wandb: true, but Weights & Biases cannot start: {reason}; log in with `wandb "
                "login`, set WANDB_MODE=offline, or use --no-wandb"
            ) from None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _run_id(folder: Path) -> str:
    """The run's name for Weights & Biases, made up the first time.

    Raises:
        UserError: it cannot be written.
    """
    path = folder / "wandb_id"
    if not path.is_file():
        with replacing(path) as partial:
            partial.write_text(uuid.uuid4().hex, "utf-8")
    return path.read_text("utf-8", errors="replace").strip()
