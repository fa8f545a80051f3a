"""What commands do alike: options, logging, errors as one sentence with an exit code."""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib.util
import itertools
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from sgm.distributed import Rank
from sgm.errors import UserError, nearest_name
from sgm.one_voice import said_by_another

_ROOT = Path(__file__).parents[1]

# What libraries would say among our lines; who wants it back sets the variable otherwise.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bar over the text encoder's weights
    "TRANSFORMERS_VERBOSITY": "error",  # its table of T5's decoder weights, which are not needed
}


def _is_news(record: logging.LogRecord) -> bool:
    """Whether DeepSpeed says more than that it found no GPU, which our own lines say better."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def _is_for_users(record: logging.LogRecord) -> bool:
    """Whether it is a warning, or not from an installed library: those report what they found."""
    is_installed = {"site-packages", "dist-packages"} & set(Path(record.pathname).parts)
    return record.levelno >= logging.WARNING or not is_installed


class _OneVoice(logging.StreamHandler):
    """Writes to stderr what no other process has said."""

    def emit(self, record: logging.LogRecord) -> None:
        """As its base; a message that cannot be put together is for that one to report."""
        with suppress(TypeError, ValueError, KeyError):
            if record.levelno >= logging.WARNING and said_by_another(self.format(record)):
                return
        super().emit(record)


def set_up_logging(level: int = logging.INFO) -> None:
    """Plain lines on stderr from `level` on; from libraries, and on other ranks, only warnings.

    A warning that several ranks give is shown once.

    To be called before SAT, DeepSpeed or transformers are imported: what they would report of
    their own start is held back.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # DeepSpeed sets the level of its logger itself, at import; a filter outlives that.
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    level = level if Rank.from_environment().index == 0 else logging.WARNING
    handler = _OneVoice(sys.stderr)
    handler.addFilter(_is_for_users)
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)


_TRUTH = ("true", "false", "yes", "no", "on", "off", "0", "1")  # what YAML files and others say


class CommandParser(argparse.ArgumentParser):
    """argparse with one sentence for a mistake, and flags in full, with - or _ between words."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """As argparse; a flag that is unknown is named before what is absent."""
        words = [self._with_hyphens(word) for word in (sys.argv[1:] if args is None else args)]
        flags = itertools.takewhile(lambda word: word != "--", words)
        switch = None
        for word in flags:
            name, equals, _ = word.partition("=")
            is_flag = re.fullmatch(r"--[a-zA-Z]\S*", name)
            if is_flag and name not in self._option_string_actions:
                self._refuse(word)
            action = self._option_string_actions.get(name)
            is_switch = isinstance(action, argparse.BooleanOptionalAction)
            if (is_switch and equals) or (switch and word.lower() in _TRUTH):
                on, off = (action if is_switch else switch).option_strings[:2]
                self.error(f"{on} takes no value; {off} says the opposite")
            switch = action if is_switch else None
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
        self.error(f"unknown argument {word!r}{hint}")

    def _with_hyphens(self, word: str) -> str:
        """``--batch_size=2`` as ``--batch-size=2``; what is no flag stays as it is."""
        name, equals, value = word.partition("=")
        hyphened = name.replace("_", "-")
        is_flag = name.startswith("--") and hyphened in self._option_string_actions
        return hyphened + equals + value if is_flag else word

    def error(self, message: str) -> NoReturn:
        """Exit with 2 after one line, where argparse would put the list of all flags first."""
        self.exit(2, f"error: {message} (--help lists all flags)\n")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """While libraries are imported and models built: all that they make is there to stay.

    Python would look through it for garbage again and again, which takes a fifth of start-up.
    Nor will it look there later, until an end other than that of `run_and_exit`, where Triton
    reports what is not taken down.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)
        gc.enable()


def add_option(parser: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """Add the option ``--{name}``, spelt with _ or -; `settings` as in `add_argument`."""
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", **settings)


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add ``--fp16`` and ``--bf16``: the result's `dtype` is the name of a torch.dtype, or None."""
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
    """What to do where a `module` of an installed `package` is absent, or all of that is."""
    advice = "install what requirements.txt names: pip install -r requirements.txt"
    if importlib.util.find_spec(package) is not None:
        return f"{package} in {sys.executable} has no {module}, so it is another version; {advice}"
    return f"{sys.executable} has no package {package!r}; start the Python that has it, or {advice}"


def run_command(main: Callable[[], int]) -> int:
    """Run a command's `main`; its exit code, or 1 and a sentence for a user's mistake.

    That a package is absent is one only where it is imported in `main`, not before.
    """
    try:
        return main()
    except UserError as error:
        code, said = 1, f"error: {error}"
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        first_line = str(error).splitlines()[0]
        code, said = 1, f"error: {first_line} (see 'Troubleshooting' in README)"
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or (_ROOT / package).exists() or (_ROOT / f"{package}.py").exists():
            raise
        code, said = 1, f"error: {_missing_package(package, error.name)}"
    except KeyboardInterrupt:
        code, said = 130, "stopped"
    if said_by_another(said):
        time.sleep(0.2)  # torchrun ends the others, so the one that says it too, once one has left
    else:
        sys.stderr.write(f"{said}\n")  # in one piece, where several processes have one to say
    return code


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """`run_command` as the whole of a process.

    At its end threads are waited for and what is registered for it is called, as ever; but then
    Python would take a second to take apart all that was loaded, and is not let.
    """
    code = run_command(main)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # None or closed, where a caller has closed it; or nobody reads it any more.
        with suppress(AttributeError, ValueError, BrokenPipeError):
            stream.flush()
    os._exit(code)
