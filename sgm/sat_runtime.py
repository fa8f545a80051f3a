"""SwissArmyTransformer (SAT): what of it is imported, and what it needs before it builds a layer.

Its packages import all of their models and its own trainer, and with these wandb, datasets, pandas,
transformers and DeepSpeed: two seconds, and many more where files come over a network. Here such a
package counts as imported before its code has run. That runs when a name is wanted which is not a
module of its own, or one of SAT's ready models. Until then the registry in which SAT looks for
models to download is empty: who needs that imports sat before sgm.

On a machine with a GPU SAT imports DeepSpeed besides, for its checkpointing of activations. Here it
does without, as it does on others.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

from sgm.distributed import Rank

_MODELS = "sat.model.official"  # its modules rely on the code of sat.model
_PARALLEL = "sat.mpu"  # imports DeepSpeed, or goes on without it
_NAMES_OF_THE_CODE = ("__all__", "__version__")  # other special names a package has, or has not


def leave_out_unused_parts() -> None:
    """To be called before SAT is imported; without effect after that, or where it is absent."""
    os.environ.setdefault("SAT_LOGLEVEL", "WARNING")  # it reports that it does without DeepSpeed
    if "sat" in sys.modules or find_spec("sat") is None:
        return
    sat = _Unexecuted(find_spec("sat"))
    model = _Unexecuted(find_spec("sat.model"))
    sat.package.model = model.package
    sys.meta_path[:0] = [_WholeBeforeModels(model), _WithoutDeepSpeed()]


class _Unexecuted:
    """A package that is imported but for its code."""

    def __init__(self, spec: ModuleSpec) -> None:
        self.spec = spec
        self.lock = threading.RLock()
        self.is_running = False
        self.package = module_from_spec(spec)
        self.package.__getattr__ = self.find  # for what it does not have yet (PEP 562)
        sys.modules[spec.name] = self.package

    def find(self, attribute: str) -> Any:
        """A module of the package, or what its code defines."""
        name = self.spec.name
        is_of_the_code = not attribute.startswith("__") or attribute in _NAMES_OF_THE_CODE
        if is_of_the_code and find_spec(f"{name}.{attribute}") is not None:
            return importlib.import_module(f"{name}.{attribute}")
        if is_of_the_code:
            self.execute()
        if attribute not in self.package.__dict__:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        return self.package.__dict__[attribute]

    def execute(self) -> None:
        """Run the code once; if it fails, it is run again, and fails, where it is needed next."""
        with self.lock:
            has_run = "__getattr__" not in self.package.__dict__
            if has_run or self.is_running:  # while it runs it may ask for names of itself
                return
            self.is_running = True
            try:
                self.spec.loader.exec_module(self.package)
                del self.package.__getattr__
            finally:
                self.is_running = False


class _WholeBeforeModels:
    """Runs the code of `sat.model` where one of SAT's models is imported, as Python would."""

    def __init__(self, package: _Unexecuted) -> None:
        self.package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        """Finds nothing itself: what comes after it does."""
        if name == _MODELS:
            self.package.execute()


class _WithoutDeepSpeed:
    """Loads `sat.mpu` while DeepSpeed counts as absent, unless it is imported already."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module where Python would find it, with a loader of its own; of others nothing."""
        if name != _PARALLEL or "deepspeed" in sys.modules:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LoaderWithoutDeepSpeed(spec.loader.name, spec.loader.path)
        return spec


class _LoaderWithoutDeepSpeed(SourceFileLoader):
    """Loads as Python does; meanwhile other threads find no DeepSpeed either."""

    def exec_module(self, module: ModuleType) -> None:
        before = sys.modules.get("deepspeed")
        sys.modules["deepspeed"] = None  # which makes Python say that there is none
        try:
            super().exec_module(module)
        finally:
            del sys.modules["deepspeed"]
            if before is not None:
                sys.modules["deepspeed"] = before


def ensure_process_groups() -> None:
    """Create the process groups that SAT's layers ask for their size, unless they exist.

    A training run has made them already, and nothing happens. A process on its own gets a group
    of one, whose store lives in its memory: it takes no port and meets no other job. Under torchrun
    (``WORLD_SIZE`` above 1) the ranks meet at the address that torchrun gives them; every rank
    holds the whole model. GPU tensors go through NCCL: gloo would take each by way of the host,
    even with nobody to send it to. Unlike SAT's own start-up for single models, this
    leaves the random generators alone.
    """
    import torch
    from sat import mpu

    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if Rank.from_environment().world_size > 1:
            torch.distributed.init_process_group(backend)
        else:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
            leave_process_groups_at_exit()
    if not mpu.model_parallel_is_initialized():
        with quiet_sat():
            mpu.initialize_model_parallel(1)


def leave_process_groups_at_exit() -> None:
    """Have the process groups taken down at exit; NCCL warns of a process that ends without.

    A process on its own has called this with its groups; again does no harm. One of several is to
    call it when its work is done, so not after a failure: NCCL would wait for what the others no
    longer take part in.
    """
    atexit.register(_leave_process_groups)


def _leave_process_groups() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def quiet_sat() -> Iterator[None]:
    """Hold back what SAT reports below an error.

    That is a line for every layer it changes, and warnings about optional packages at import.
    """
    sat_logger = logging.getLogger("sat")
    level = sat_logger.level
    sat_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        sat_logger.setLevel(level)
