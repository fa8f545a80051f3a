"""Parse command lines: every option of a command in `sgm.config` is also a flag.

The files of ``--base a.yaml b.yaml`` are merged in this order, and flags override the files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from sgm.cli import CommandParser
from sgm.config import IGNORED_ARGS, CommonArgs, Config, load_config
from sgm.options import value_type


def build_parser(args_class: type[CommonArgs], description: str) -> CommandParser:
    """Return a command's parser, with a flag for every option of `args_class`.

    Flags may be written with hyphens or underscores.
    """
    parser = CommandParser(description=description)
    parser.add_argument(
        "--base", nargs="+", required=True, metavar="YAML", help="configurations, merged in order"
    )
    parser.add_argument(
        "--allow-target",
        action="append",
        default=[],
        metavar="PREFIX",
        help="allow classes under this dotted prefix in configurations; for trusted files only",
    )
    for name, field in args_class.model_fields.items():
        kind, choices, is_list = value_type(field.annotation)
        # argparse would read a single % as a placeholder.
        help_text = (field.description or "").replace("%", "%%")
        settings: dict[str, Any] = {"default": None, "help": help_text}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            kind = (
                kind if kind in (int, float) else str
            )  # other types are parsed from strings later
            settings |= {"type": kind, "choices": choices or None}
            settings |= {"nargs": "+"} if is_list else {}
        parser.add_argument(_flag(name), **settings)
    for name, reason in IGNORED_ARGS.items():
        settings = {"action": argparse.BooleanOptionalAction, "help": f"no effect: {reason}"}
        parser.add_argument(_flag(name), **settings)
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_config(
    args_class: type[CommonArgs], description: str, argv: Sequence[str] | None = None
) -> Config:
    """Parse a command line, and load the configuration files that it names.

    If the command line is invalid, exit with code 2, as argparse does.

    Raises:
        UserError: the configuration is invalid; see `sgm.config.load_config`.
    """
    flags = vars(build_parser(args_class, description).parse_args(argv))
    files, allow_target = flags.pop("base"), flags.pop("allow_target")
    given = {name: value for name, value in flags.items() if value is not None}
    return load_config(args_class, files, given, allow_target=allow_target)
