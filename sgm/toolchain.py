"""Check whether Triton and torch.compile can compile code on this machine."""

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


# Triton searches for a C compiler unless CC is set. On a CPU, torch.compile searches for a C++
# compiler unless CXX is set.
_C_COMPILERS, _CPP_COMPILERS = ("clang", "gcc"), ("clang++", "g++")


@functools.lru_cache
def can_compile_kernels() -> bool:
    """Return whether Triton, a C compiler and Python's headers are installed.

    If something is missing, it is logged in one warning. Everything works without compiled kernels,
    but slower.
    """
    missing = None
    if find_spec("triton") is None:
        missing = "triton is not installed"
    elif not (os.environ.get("CC") or any(map(shutil.which, _C_COMPILERS))):
        missing = "a C compiler is missing (install gcc)"
    elif not _has_headers():
        missing = "Python's headers are missing (install python3-dev)"
    if missing:
        logger.warning(
            "this project's GPU kernels cannot be used, so this run is slower: %s", missing
        )
    return missing is None


def _has_headers() -> bool:
    """Return whether compilers can find Python's headers.

    Debian's default scheme is not where its headers are, so "posix_prefix" is searched too.
    """
    if os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH"):
        return True
    schemes = {sysconfig.get_default_scheme(), "posix_prefix"}
    places = [sysconfig.get_path("include", scheme) for scheme in schemes]
    return any(Path(place, "Python.h").is_file() for place in places)


def check_compile(device_type: str) -> None:
    """Check that torch.compile has the compilers that it needs.

    Args:
        device_type: "cuda" or "cpu".

    Raises:
        UserError: a compiler or Python's headers are missing.
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
