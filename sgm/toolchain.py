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


# Triton looks for the C compilers unless CC is set, torch.compile on a CPU for the others unless
# CXX is set.
_C_COMPILERS, _CPP_COMPILERS = ("clang", "gcc"), ("clang++", "g++")


@functools.lru_cache
def can_compile_kernels() -> bool:
    """Whether Triton is installed, with the C compiler and the Python headers that it needs.

    If not, one warning says what is missing. Everything works without kernels, but slower.
    """
    missing = None
    if find_spec("triton") is None:
        missing = "triton is not installed"
    elif not (os.environ.get("CC") or any(map(shutil.which, _C_COMPILERS))):
        missing = "there is no C compiler (install gcc)"
    elif not _has_headers():
        missing = "Python's headers are missing (install python3-dev)"
    if missing:
        logger.warning("no kernels of our own on the GPU, so it is slower: %s", missing)
    return missing is None


def _has_headers() -> bool:
    """Whether Python's headers are where compilers look, which on Debian is not the default."""
    if os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH"):
        return True
    schemes = {sysconfig.get_default_scheme(), "posix_prefix"}
    places = [sysconfig.get_path("include", scheme) for scheme in schemes]
    return any(Path(place, "Python.h").is_file() for place in places)


def check_compile(device_type: str) -> None:
    """Check that torch.compile can work for "cuda" or "cpu".

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
