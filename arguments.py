"""Command lines: every option of `sgm.config` is a flag of its command.

``--base a.yaml b.yaml`` are merged in this order; a flag wins over the files.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from sgm.cli import CommandParser
from sgm.config import (
    IGNORED_ARGS,
    CommonArgs,
    Config,
    LoraChoice,
    load_config,
    lora_from_text,
    value_type,
)

_FROM_TEXT = {LoraChoice: lora_from_text}  # of a flag, where it is not the type itself


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
    hints = typing.get_type_hints(args_class)
    for option in dataclasses.fields(args_class):
        kind, choices, is_list = value_type(hints[option.name])
        # argparse would take a bare % for a placeholder.
        help_text = option.metadata["help"].replace("%", "%%")
        settings: dict[str, Any] = {"default": None, "help": help_text}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": _FROM_TEXT.get(kind, kind), "choices": choices or None}
            settings |= {"nargs": "+"} if is_list else {}
        parser.add_argument(_flag(option.name), **settings)
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
