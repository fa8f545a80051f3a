"""What all commands share: options, logging, and errors as one sentence with an exit code."""

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

# Output of libraries that is held back. A user who wants it sets the variable to another value.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # the progress bar of transformers for T5's weights
    "TRANSFORMERS_VERBOSITY": "error",  # its table of T5's decoder weights, which are not needed
}

# Loggers whose messages are about the prompts and clips of one rank. Other loggers of sgm write the
# same warnings on every rank.
LOGGERS_OF_ONE_RANK = {
    "sgm.data.cache",
    "sgm.modules.encoders.modules",
    "sgm.progress",
    "sgm.training.validation",
}


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record is not DeepSpeed's report of a missing GPU, which our log repeats."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def _is_for_users(record: logging.LogRecord) -> bool:
    """Whether a record is a warning or comes from code that is not an installed library."""
    is_installed = {"site-packages", "dist-packages"} & set(Path(record.pathname).parts)
    return record.levelno >= logging.WARNING or not is_installed


def _is_of_this_rank(record: logging.LogRecord) -> bool:
    """Whether rank 0 does not log the same record."""
    is_shared = record.name.startswith("sgm.") and record.name not in LOGGERS_OF_ONE_RANK
    return record.levelno >= logging.ERROR or not is_shared


def set_up_logging(level: int = logging.INFO) -> None:
    """Log plain lines to stderr from `level` on.

    Libraries log only warnings and errors. Ranks above 0 log only errors and the warnings that
    rank 0 does not log.

    Call this before SAT, DeepSpeed or transformers are imported, to hold back what they report
    when they are imported.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # DeepSpeed sets the level of its logger when it is imported; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_is_for_users)
    if Rank.from_environment().index > 0:
        level = logging.WARNING
        handler.addFilter(_is_of_this_rank)
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)


_TRUTH = ("true", "false", "yes", "no", "on", "off", "0", "1")  # values of switches elsewhere


class CommandParser(argparse.ArgumentParser):
    """An argparse parser that reports a mistake in one sentence.

    Flags cannot be abbreviated. Their words may be joined by - or _.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse like argparse, but report an unknown flag before a missing one.

        Exits with code 2 after one line on stderr if the command line is invalid.
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
            hint = "; a switch takes no value, and --no-NAME says the opposite"
        self.error(f"unknown argument {word!r}{hint}")

    def _with_hyphens(self, word: str) -> str:
        """``--batch_size=2`` as ``--batch-size=2``; a word that is not a flag is not changed."""
        name, equals, value = word.partition("=")
        hyphened = name.replace("_", "-")
        is_flag = name.startswith("--") and hyphened in self._option_string_actions
        return hyphened + equals + value if is_flag else word

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after one line, without argparse's list of all flags."""
        self.exit(2, f"error: {message} (--help lists all flags)\n")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable the garbage collector while libraries are imported and models are built.

    Nearly all objects made then live until the end. Searching them for garbage would take a fifth
    of the start-up, so they are also frozen: the collector never looks at them later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def add_option(parser: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """Add the option ``--{name}``, spelled with _ or -. `settings` go to `add_argument`."""
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", **settings)


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add ``--fp16`` and ``--bf16``. The parsed `dtype` is the name of a torch.dtype or None."""
    group = parser.add_mutually_exclusive_group()
    for flag, name in (("--fp16", "float16"), ("--bf16", "bfloat16")):
        group.add_argument(
            flag,
            dest="dtype",
            action="store_const",
            const=name,
            help=f"write the transformer in {name}; default: as it is",
        )


def _missing_package(package: str, module: str) -> str:
    """The error for a missing `module`: its `package` is missing, or is another version."""
    advice = "install what requirements.txt names: pip install -r requirements.txt"
    if importlib.util.find_spec(package) is not None:
        return f"{package} in {sys.executable} has no {module}, so it is another version; {advice}"
    return f"{sys.executable} has no package {package!r}; start the Python that has it, or {advice}"


def run_command(main: Callable[[], int]) -> int:
    """Run a command's `main` and return its exit code.

    A `UserError`, a lack of memory or a missing package is printed as one sentence, and the exit
    code is 1. Packages that are imported before `main` is called are not covered. Ctrl-C gives 130.
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
        if code == 130:  # rank 0 prints it
            return code
        time.sleep(1)  # rank 0 usually fails for the same reason, and then torchrun ends this rank
    sys.stderr.write(f"{message}\n")  # one write, so that lines of several processes do not mix
    return code


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Run a command's `main` with `run_command` as the whole of a process, and exit with its code.

    The garbage collector is switched off for the end of the process, where Python would spend a
    second searching the loaded libraries for garbage.
    """
    code = run_command(main)
    gc.disable()
    gc.freeze()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, ValueError):  # the caller has closed it
            pass
        except BrokenPipeError:  # the reader has left; Python's own flush would report that
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
