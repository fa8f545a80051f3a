"""Command lines: every option of `sgm.config` is a flag of its command.

``--base a.yaml b.yaml`` are merged in this order; a flag wins over the files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from sgm.cli import CommandParser
from sgm.config import IGNORED_ARGS, CommonArgs, Config, load_config
from sgm.options import value_type


def build_parser(args_class: type[CommonArgs], description: str) -> CommandParser:
    """The parser of a command whose `args` are `args_class`; both - and _ spell a flag."""
    parser = CommandParser(description=description)
    parser.add_argument(
        "--base", nargs="+", required=True, metavar="YAML", help="configurations, merged in order"
    )
    parser.add_argument(
        "--allow-target",
        action="append",
        default=[],
        metavar="PREFIX",
        help="let the configuration name classes under this dotted prefix (trusted files only)",
    )
    for name, field in args_class.model_fields.items():
        kind, choices, is_list = value_type(field.annotation)
        # argparse would take a bare % for a placeholder.
        help_text = (field.description or "").replace("%", "%%")
        settings: dict[str, Any] = {"default": None, "help": help_text}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            kind = kind if kind in (int, float) else str  # the options parse what is more than text
            settings |= {"type": kind, "choices": choices or None}
            settings |= {"nargs": "+"} if is_list else {}
        parser.add_argument(_flag(name), **settings)
    for name, reason in IGNORED_ARGS.items():
        settings = {"action": argparse.BooleanOptionalAction, "help": f"unused: {reason}"}
        parser.add_argument(_flag(name), **settings)
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_config(
    args_class: type[CommonArgs], description: str, argv: Sequence[str] | None = None
) -> Config:
    """Parse a command line and the files it names.

    Exits with code 2 for a wrong command line, as argparse does.

    Raises:
        UserError: see `sgm.config.load_config`.
    """
    flags = vars(build_parser(args_class, description).parse_args(argv))
    files, allow_target = flags.pop("base"), flags.pop("allow_target")
    given = {name: value for name, value in flags.items() if value is not None}
    return load_config(args_class, files, given, allow_target=allow_target)
