"""The weights that tools/convert_weight_sat2hf.py converts, and their configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from arguments import parse_config
from sgm.checkpoint.find import find_transformer
from sgm.config import Config, SamplingArgs
from sgm.errors import UserError
from sgm.preflight import weight_paths
from sgm.util import is_finite_number
from tools.launch.choose_config import BUNDLED, FULL

logger = logging.getLogger(__name__)


ROOT = Path(__file__).resolve().parents[2]
_NAMES = {  # part → option, key of a configuration
    "transformer": ("--transformer_ckpt_path", "args.load"),
    "vae": ("--vae_ckpt_path", "model.first_stage_config.params.ckpt_path"),
    "text_encoder": ("--text_encoder_path", "model_dir"),
}


@dataclass
class Sources:
    """The paths of the parts of a pipeline; None for a part that is not written.

    `are_options` is true if they come from command-line options, not from a configuration.
    """

    transformer: str | None
    vae: str | None
    text_encoder: str | None
    are_options: bool = True

    def paths(self) -> list[str | None]:
        """The paths of all parts."""
        return [self.transformer, self.vae, self.text_encoder]

    def missing(self) -> list[str]:
        """The paths that do not exist."""
        return [path for path in self.paths() if path and not _exists(path)]

    def name(self, part: str) -> str:
        """How messages name the path of a part: by its option or its key of the configuration."""
        return _NAMES[part][0 if self.are_options else 1]


def select(config: Config, key: str, default: Any) -> Any:
    """The value of a dotted key below ``model``; `default` if it is missing or null."""
    value = OmegaConf.select(OmegaConf.create(config.model), key)
    return default if value is None else value


def select_number(config: Config, key: str, default: float) -> float:
    """As `select`, for a positive number.

    Raises:
        UserError: the value is not a positive number.
    """
    value = select(config, key, default)
    if not (is_finite_number(value) and value > 0):
        raise UserError(f"model.{key}={value!r} of the configuration must be a positive number")
    return float(value)


def read_config(*files: str | Path) -> Config:
    """The checked configuration that `files` make when they are merged in order.

    Raises:
        UserError: a file is missing or invalid.
    """
    return parse_config(SamplingArgs, "", ["--base", *map(str, files)])


def _from_config(config: Config) -> Sources:
    """The paths in a configuration. Those of shipped ones are relative to the repository."""
    vae, *texts = (named.value for named in weight_paths(config.model))
    found = []
    for value in (config.args.load, vae, next(filter(None, texts), None)):
        path = str(value) if value else None
        is_shipped = path and not _exists(path) and (ROOT / path).exists()
        found.append(str(ROOT / path) if is_shipped else path)
    return Sources(*found, are_options=False)


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def choose_sources(given: Sources, base: Sequence[str] | None) -> tuple[Config, Sources]:
    """Choose the configuration of a conversion and the weights to convert.

    Args:
        given: the options. If all are None, the paths come from the configuration.
        base: the option ``--base``. If it is None, the configuration is that of the run which the
            transformer belongs to, or else the 2B model's. If no path is given either and the 2B
            weights do not exist, it is the bundled model's.

    Raises:
        UserError: a configuration is invalid, or the transformer does not exist.
    """
    has_paths = any(given.paths())
    if has_paths and not base:
        return read_config(_config_of_run(given) or ROOT / FULL), given
    config = read_config(*(base or [ROOT / FULL]))
    sources = given if has_paths else _from_config(config)
    missing = sources.missing()
    if base:
        if len(missing) > 1:
            named_by = "the options" if has_paths else " + ".join(base)
            raise UserError(f"{named_by}: {', '.join(missing)} do not exist; check the paths")
    elif missing or not all(sources.paths()):
        logger.info(
            "weights that %s names do not exist: %s (see 'Getting the 2B weights' in README.md). "
            "The bundled model instead, by %s",
            *(FULL, ", ".join(missing), BUNDLED),
        )
        config = read_config(ROOT / BUNDLED)
        sources = _from_config(config)
    return config, sources


def _config_of_run(given: Sources) -> str | None:
    """The training_config.yaml of the run that the transformer belongs to."""
    if given.transformer is None:
        return None
    path = find_transformer(given.transformer, option=given.name("transformer")).path
    files = (folder / "training_config.yaml" for folder in list(path.parents)[:2])
    return next((str(file) for file in files if file.is_file()), None)
