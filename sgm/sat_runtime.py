"""Lazy import of SwissArmyTransformer (SAT), and the process groups that it needs.

SAT's packages import all of its models and its trainer, and through them wandb, datasets, pandas,
transformers and DeepSpeed. This takes two seconds, and much longer from a network drive. To avoid
it, three of SAT's packages are put into `sys.modules` without running their code. The code of such
a package runs when an attribute is requested that is not one of the package's modules. Until then,
SAT's registry of downloadable models is empty; a program that needs the registry must import sat
before sgm.

Compiling for a GPU pickles a class of SAT. Pickling may request such an attribute, which imports
all of SAT once.

On a machine with a GPU, `sat.mpu` imports DeepSpeed for activation checkpointing. This module
prevents that import, because `sat.mpu` also works without DeepSpeed.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec

from sgm.distributed import Rank

_MODELS = "sat.model.official"  # its modules need the code of sat.model
_PARALLEL = "sat.mpu"  # imports DeepSpeed if possible


def leave_out_unused_parts() -> None:
    """Put the packages of SAT into `sys.modules` without running their code.

    Call this before SAT is imported. It has no effect if SAT is imported already or not installed.
    """
    os.environ.setdefault("SAT_LOGLEVEL", "WARNING")  # else SAT logs that DeepSpeed is missing
    if "sat" in sys.modules or find_spec("sat") is None:
        return
    for name in ("sat", "sat.model", _PARALLEL):
        _import_without_code(name)
    sys.meta_path.insert(0, _CodeBeforeModels)


def _import_without_code(name: str) -> None:
    """Put the package `name` into `sys.modules`; run its code when a missing name is requested."""
    spec = find_spec(name)
    assert spec is not None
    package = module_from_spec(spec)
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)

    def find(attribute: str) -> object:
        is_special = attribute.startswith("__") and attribute not in ("__all__", "__version__")
        if not is_special and find_spec(f"{name}.{attribute}"):
            return importlib.import_module(f"{name}.{attribute}")
        if not is_special:
            _run_code(name)
        if attribute not in vars(package):
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        return vars(package)[attribute]

    vars(package)["__getattr__"] = find  # called for missing names (PEP 562)


def _run_code(name: str) -> None:
    """Run the code of the package `name`, unless it is running already or has run."""
    package = sys.modules[name]
    if "__getattr__" not in vars(package):
        return
    without_deepspeed = name == _PARALLEL and "deepspeed" not in sys.modules
    if without_deepspeed:
        sys.modules["deepspeed"] = None  # type: ignore[assignment]  # makes its import fail
    try:
        importlib.reload(package)  # does nothing while the code runs
    finally:
        if without_deepspeed:
            del sys.modules["deepspeed"]
    vars(package).pop("__getattr__", None)


class _CodeBeforeModels:
    """An import finder that runs the code of `sat.model` before any of SAT's models is imported."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Return None, so that the next finder finds the module."""
        if name == _MODELS:
            _run_code("sat.model")


def ensure_process_groups() -> None:
    """Create the process groups whose size SAT's layers query, unless they exist already.

    A single process gets a group of one, whose store is in memory, so it needs no port and cannot
    collide with another job. Under torchrun (``WORLD_SIZE`` above 1), the ranks connect to the
    address that torchrun sets, and every rank holds the whole model. GPU tensors use NCCL, because
    gloo would copy each tensor to the host, even in a group of one. Unlike SAT's own
    initialisation, this does not change the state of random generators.
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
    """Destroy the process groups at exit, because NCCL logs a warning otherwise.

    `ensure_process_groups` calls this in a single process; a second call does no harm. If there
    are several processes, each calls it when its work is done. A process must not call it after a
    failure, because NCCL would wait for operations that the other processes no longer run.
    """
    atexit.register(_leave_process_groups)


def _leave_process_groups() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def quiet_sat() -> Iterator[None]:
    """Suppress SAT's log messages below the level ERROR within this context.

    SAT logs a line for every layer that it changes, and warnings about optional packages.
    """
    sat_logger = logging.getLogger("sat")
    level = sat_logger.level
    sat_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        sat_logger.setLevel(level)
