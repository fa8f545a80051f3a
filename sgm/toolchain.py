"""Whether kernels for a GPU can be compiled on this machine, by Triton and by torch.compile."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from sgm.errors import UserError

logger = logging.getLogger(__name__)


# Compilers that Triton looks for, unless CC names one, and torch.compile on a CPU, unless CXX does.
_C_COMPILERS, _CPP_COMPILERS = ("clang", "gcc"), ("clang++", "g++")


@functools.lru_cache
def can_compile_kernels() -> bool:
    """Whether Triton is there with the C compiler and the headers that it needs.

    If not, a warning says once what is missing; everything works without, only slower.
    """
    lacking = None
    if find_spec("triton") is None:
        lacking = "triton is not installed"
    elif not (os.environ.get("CC") or any(map(shutil.which, _C_COMPILERS))):
        lacking = "there is no C compiler (install gcc)"
    elif not _has_headers():
        lacking = "Python's headers are not there (install python3-dev)"
    if lacking:
        logger.warning("no kernels of our own on the GPU, so it is slower: %s", lacking)
    return lacking is None


def _has_headers() -> bool:
    """Whether Python's headers are where compilers look; on Debian the default is another place."""
    if os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH"):
        return True
    schemes = {sysconfig.get_default_scheme(), "posix_prefix"}
    places = [sysconfig.get_path("include", scheme) for scheme in schemes]
    return any(Path(place, "Python.h").is_file() for place in places)


def check_compile(device_type: str) -> None:
    """Check that torch.compile can work for "cuda" or "cpu".

    Raises:
        UserError: something that it needs is not there.
    """
    if device_type == "cuda":
        works = can_compile_kernels()
    else:
        works = bool(os.environ.get("CXX") or any(map(shutil.which, _CPP_COMPILERS)))
    if not works:
        raise UserError(
            "compile: a compiler and Python's headers are needed; install g++ and python3-dev, or "
            "leave compile out"
        )
