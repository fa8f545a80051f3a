"""Write the metrics of a run to a file, to TensorBoard, or to Weights & Biases.

Each class has two methods. `log` adds a point to each curve, by the curve's name ``group/name``; it
may raise OSError. `close` must be the last call.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from sgm.errors import UserError
from sgm.files import make_output_folder, replacing


class MetricsFile:
    """Writes a JSON Lines file, with one object for each call of `log`.

    An object contains ``step`` and the value of each curve, such as ``train/loss``. A value that is
    not finite becomes null.

    Args:
        path: the file; lines are appended if it exists.
        start_step: the step at which the run starts or is resumed. Lines of later steps are removed
            because the run will repeat these steps. An incomplete line is removed too.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path, *, start_step: int) -> None:
        self.path = path
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
        with replacing(path) as partial:
            kept = [line for line in lines if _step_of(line) <= start_step]
            partial.write_text("".join(kept), "utf-8")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append a line with all `scalars`."""
        values: dict[str, float | None] = {"step": step}
        for name, value in scalars.items():
            values[_curve_name(name)] = value if math.isfinite(value) else None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Do nothing; each line is on disk already."""


def _curve_name(name: str) -> str:
    return name.replace(" ", "_")  # TensorBoard does not allow spaces


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Writes event files for ``tensorboard --logdir``.

    Events are written in the caller's thread and are on disk when `log` returns. The usual writer
    of tensorboardX is not used because it has a thread and a queue: on a full disk the thread dies
    and the queue blocks the training.

    Args:
        folder: the folder of the event files; created if it does not exist.
        start_step: the step at which the run starts or is resumed. TensorBoard then hides points of
            later steps, which a killed process left.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, start_step: int = 0) -> None:
        make_output_folder(folder)
        # The writer's file name contains the time only to the second, so append the process id.
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if start_step > 0:
            session = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=start_step + 1, session_log=session))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one event with all `scalars`."""
        event = Event(wall_time=time.time(), step=step)
        for name, value in scalars.items():
            event.summary.value.extend(scalar(_curve_name(name), value).value)
        self._write(event)

    def _write(self, event: Event) -> None:
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """Logs to a Weights & Biases run; wandb's environment variables (WANDB_MODE …) apply.

    Args:
        folder: the run's folder. The wandb run gets the folder's name. The id of the wandb run is
            saved in the folder, so a resumed training continues the same wandb run.
        project: the Weights & Biases project.
        config: the settings of the run.

    Raises:
        UserError: wandb is not installed, not logged in or cannot start.
    """

    def __init__(self, folder: Path, *, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "wandb: true, but wandb is not installed; run pip install wandb, or use --no-wandb"
            ) from None
        identity = folder / "wandb_id"
        if not identity.is_file():
            with replacing(identity) as partial:
                partial.write_text(uuid.uuid4().hex, "utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=identity.read_text("utf-8", errors="replace").strip(),
                resume="allow",
                dir=str(folder),
                config=dict(config),
            )
        except (wandb.Error, ValueError, OSError) as error:  # ValueError: an invalid variable
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise UserError(
                f"wandb: true, but Weights & Biases cannot start: {reason}; log in with `wandb "
                "login`, set WANDB_MODE=offline, or use --no-wandb"
            ) from error

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Send all remaining data."""
        self._run.finish()
