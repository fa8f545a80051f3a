"""Code shared by all commands: the option parser, logging, and the reporting of errors."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from sgm.distributed import Rank
from sgm.errors import UserError, nearest_name

_ROOT = Path(__file__).parents[1]

# Variables that suppress output of libraries, unless the user sets them to another value.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # progress bar of transformers while it loads T5
    "TRANSFORMERS_VERBOSITY": "error",  # table of T5's decoder weights, which are not needed
}

# Loggers whose messages concern the prompts and clips of one rank. The other loggers of sgm log the
# same warnings on every rank.
LOGGERS_OF_ONE_RANK = {
    "sgm.data.cache",
    "sgm.modules.encoders.modules",
    "sgm.progress",
    "sgm.training.validation",
}


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for DeepSpeed's message about a missing GPU, which our own log already has."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def _is_for_users(record: logging.LogRecord) -> bool:
    """Return True for warnings and errors, and for all records of code outside site-packages."""
    is_installed = {"site-packages", "dist-packages"} & set(Path(record.pathname).parts)
    return record.levelno >= logging.WARNING or not is_installed


def _is_of_this_rank(record: logging.LogRecord) -> bool:
    """Return False for warnings of sgm that all ranks share, because rank 0 logs them too."""
    is_shared = record.name.startswith("sgm.") and record.name not in LOGGERS_OF_ONE_RANK
    return record.levelno >= logging.ERROR or not is_shared


def set_up_logging(level: int = logging.INFO) -> None:
    """Log messages of at least `level` to stderr, as plain lines.

    For libraries, only warnings and errors are logged. Ranks above 0 log all errors, and those
    warnings that rank 0 does not log.

    Call this before importing SAT, DeepSpeed or transformers, because they log during import.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # Use a filter, because DeepSpeed's import overwrites the level of its logger.
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_is_for_users)
    if Rank.from_environment().index > 0:
        level = logging.WARNING
        handler.addFilter(_is_of_this_rank)
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)


_TRUTH = ("true", "false", "yes", "no", "on", "off", "0", "1")  # values that users give switches


class CommandParser(argparse.ArgumentParser):
    """An argparse parser that reports an invalid command line in one sentence.

    Flags cannot be abbreviated, and may be written with hyphens or underscores.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse like argparse, but report an unknown flag before a missing one.

        If the command line is invalid, print one line to stderr and exit with code 2.
        """
        words = [self._with_hyphens(word) for word in (sys.argv[1:] if args is None else args)]
        for word in itertools.takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            if re.fullmatch(r"--[a-zA-Z]\S*", name) and name not in self._option_string_actions:
                self._refuse(word)
        namespace, rest = self.parse_known_args(words)
        if rest:
            self._refuse(rest[0])
        return namespace

    def _refuse(self, word: str) -> NoReturn:
        name = word.partition("=")[0]
        hint = ""
        if name.startswith("-"):
            hint = f"; {nearest_name(name, self._option_string_actions)}"
        if name.endswith((".yaml", ".yml")) and "--base" in self._option_string_actions:
            hint = "; configurations come before all flags"
        if word.lower() in _TRUTH:
            hint = "; a switch takes no value, use --no-NAME to turn it off"
        self.error(f"unknown argument {word!r}{hint}")

    def _with_hyphens(self, word: str) -> str:
        """Change ``--batch_size=2`` to ``--batch-size=2``; return other words unchanged."""
        name, equals, value = word.partition("=")
        hyphened = name.replace("_", "-")
        is_flag = name.startswith("--") and hyphened in self._option_string_actions
        return hyphened + equals + value if is_flag else word

    def error(self, message: str) -> NoReturn:
        """Print one line without argparse's list of all flags, and exit with code 2."""
        self.exit(2, f"error: {message} (--help lists all flags)\n")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable the garbage collector in a ``with`` block that imports libraries or builds models.

    Nearly all objects of this phase live until the process ends, and searching them for garbage
    would take a fifth of the start-up time. At the end of the block they are frozen, so that the
    collector never visits them later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def add_option(parser: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """Add the option ``--{name}``, written with _ or -. `settings` are passed to `add_argument`."""
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", **settings)


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add ``--fp16`` and ``--bf16``; the parsed `dtype` is the name of a torch.dtype, or None."""
    group = parser.add_mutually_exclusive_group()
    for flag, name in (("--fp16", "float16"), ("--bf16", "bfloat16")):
        group.add_argument(
            flag,
            dest="dtype",
            action="store_const",
            const=name,
            help=f"write the transformer in {name}; default: keep its type",
        )


def _missing_package(package: str, module: str) -> str:
    """Return the message for a missing `module`: its `package` is missing or the wrong version."""
    advice = "install the requirements with pip install -r requirements.txt"
    if importlib.util.find_spec(package) is not None:
        return f"{package} in {sys.executable} is a version without {module}; {advice}"
    return f"{sys.executable} has no package {package!r}; use a Python that has it, or {advice}"


def run_command(main: Callable[[], int]) -> int:
    """Run a command's `main` and return its exit code.

    For a `UserError`, for lack of memory and for a missing package, print one sentence and return
    1; this does not cover packages that are imported before `main` is called. For Ctrl-C, return
    130.
    """
    try:
        return main()
    except UserError as error:
        code, message = 1, f"error: {error}"
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        first_line = str(error).splitlines()[0]
        code, message = 1, f"error: {first_line} (see 'Troubleshooting' in README)"
    except ModuleNotFoundError as error:
        module = error.name or ""
        package = module.partition(".")[0]
        if not package or (_ROOT / package).exists() or (_ROOT / f"{package}.py").exists():
            raise
        code, message = 1, f"error: {_missing_package(package, module)}"
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    if Rank.from_environment().index > 0:
        if code == 130:  # rank 0 prints the message
            return code
        time.sleep(1)  # rank 0 usually fails for the same reason; torchrun then ends this rank
    sys.stderr.write(f"{message}\n")  # a single write, so that lines of processes do not mix
    return code


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Run a command's `main` with `run_command`, and exit the process with its exit code.

    The garbage collector is disabled before the exit, because Python would spend a second searching
    the loaded libraries for garbage.
    """
    code = run_command(main)
    gc.disable()
    gc.freeze()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, ValueError):  # the caller has closed it
            pass
        except BrokenPipeError:  # the reader is gone; Python's own flush would print an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
