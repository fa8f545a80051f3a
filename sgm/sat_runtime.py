"""SwissArmyTransformer (SAT): which parts of it are imported, and its process groups.

The packages of SAT import all of its models and its trainer, and with these wandb, datasets,
pandas, transformers and DeepSpeed. That takes two seconds, and many more from a network drive. So
three of its packages count as imported before their code has run. The code runs when something
asks for a name that is not a module of the package. Until then, the registry in which SAT looks
for models to download is empty; a program that needs it imports sat before sgm.

Compiling for a GPU pickles a class of SAT. That may ask for such a name, and then all of SAT is
imported once.

`sat.mpu` imports DeepSpeed on a machine with a GPU, for activation checkpointing. Here it does
without, as it does on other machines.
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
_PARALLEL = "sat.mpu"  # imports DeepSpeed if it can


def leave_out_unused_parts() -> None:
    """Put the packages of SAT into `sys.modules` without running their code.

    Call this before SAT is imported. It has no effect later, or if SAT is not installed.
    """
    os.environ.setdefault("SAT_LOGLEVEL", "WARNING")  # SAT reports that DeepSpeed is missing
    if "sat" in sys.modules or find_spec("sat") is None:
        return
    for name in ("sat", "sat.model", _PARALLEL):
        _import_without_code(name)
    sys.meta_path.insert(0, _CodeBeforeModels)


def _import_without_code(name: str) -> None:
    """Import the package `name`, whose code runs when a name is asked for that it does not have."""
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
    """Run the code of a package that was imported without, unless it is running or has run."""
    package = sys.modules[name]
    if "__getattr__" not in vars(package):
        return
    without_deepspeed = name == _PARALLEL and "deepspeed" not in sys.modules
    if without_deepspeed:
        sys.modules["deepspeed"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        importlib.reload(package)  # does nothing while the code runs
    finally:
        if without_deepspeed:
            del sys.modules["deepspeed"]
    vars(package).pop("__getattr__", None)


class _CodeBeforeModels:
    """A finder that runs the code of `sat.model` before one of SAT's models is imported."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Find nothing; the next finders do."""
        if name == _MODELS:
            _run_code("sat.model")


def ensure_process_groups() -> None:
    """Create the process groups that SAT's layers ask for their size, unless they exist.

    A single process gets a group of one, whose store is in its memory: it takes no port and does
    not meet another job. Under torchrun (``WORLD_SIZE`` above 1) the ranks meet at the address that
    torchrun gives them, and every rank holds the whole model. GPU tensors go through NCCL, since
    gloo copies each to the host, even in a group of one. Unlike SAT's own start-up for single
    models, this does not change the state of random generators.
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
    """Destroy the process groups at exit. NCCL warns of a process that exits without this.

    `ensure_process_groups` calls this in a single process; a second call does no harm. One of
    several processes calls it when its work is done, not after a failure: NCCL would wait for
    operations in which the other processes no longer take part.
    """
    atexit.register(_leave_process_groups)


def _leave_process_groups() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def quiet_sat() -> Iterator[None]:
    """Hold back SAT's messages below an error.

    SAT logs a line for every layer that it changes, and warnings about optional packages.
    """
    sat_logger = logging.getLogger("sat")
    level = sat_logger.level
    sat_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        sat_logger.setLevel(level)
