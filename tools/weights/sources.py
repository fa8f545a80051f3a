"""What tools/convert_weight_sat2hf.py converts, and the configuration that describes it."""

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
_CKPT_PATH = "model.first_stage_config.params.ckpt_path"
_NAMES = {  # part → option, key of a configuration
    "transformer": ("--transformer_ckpt_path", "args.load"),
    "vae": ("--vae_ckpt_path", _CKPT_PATH),
    "text_encoder": ("--text_encoder_path", "model_dir"),
}


@dataclass
class Sources:
    """Where the parts of a pipeline are; None for a part that is not written.

    `are_options` tells whether the user named them with options, or in a configuration.
    """

    transformer: str | None
    vae: str | None
    text_encoder: str | None
    are_options: bool = True

    def paths(self) -> list[str | None]:
        """Those of all parts."""
        return [self.transformer, self.vae, self.text_encoder]

    def name(self, part: str) -> str:
        """What messages call the path of a part: an option, or a key of the configuration."""
        option, key = _NAMES[part]
        return option if self.are_options else key


def select(config: Config, key: str, default: Any = None) -> Any:
    """The value of a dotted key of ``args`` or ``model``; `default` where it is absent or null."""
    node = OmegaConf.create({"args": vars(config.args) | {"lora": None}, "model": config.model})
    value = OmegaConf.select(node, key)
    return default if value is None else value


def select_number(config: Config, key: str, default: float) -> float:
    """As `select`, for a positive number.

    Raises:
        UserError: the value is something else.
    """
    value = select(config, key, default)
    if not (is_finite_number(value) and value > 0):
        raise UserError(f"{key}={value!r} of the configuration must be a positive number")
    return float(value)


def _from_config(config: Config) -> Sources:
    """The paths that a configuration names; those of shipped ones lie in the repository."""
    vae, *texts = (named.value for named in weight_paths(config.model))
    found = []
    for value in (config.args.load, vae, next(filter(None, texts), None)):
        path = str(value) if value else None
        own = Path(path).expanduser() if path else None
        is_shipped = own is not None and not own.exists() and (ROOT / own).exists()
        found.append(str(ROOT / own) if is_shipped else path)
    return Sources(*found, are_options=False)


def _read_config(files: Sequence[str]) -> Config:
    return parse_config(SamplingArgs, "", ["--base", *files])


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def choose_sources(given: Sources, base: Sequence[str] | None) -> tuple[Config, Sources]:
    """The configuration of a conversion, and what is converted.

    Args:
        given: the options; where all are None, the configuration names the paths.
        base: the option, or None: then the run's own configuration, the 2B model's, or, where no
            path is given and the 2B weights are not there, the bundled model's.

    Raises:
        UserError: a configuration is wrong, or the transformer does not exist.
    """
    has_paths = any(given.paths())
    if base:
        config = _read_config(base)
        sources = given if has_paths else _from_config(config)
        missing = [path for path in sources.paths() if path and not _exists(path)]
        if len(missing) > 1:
            named_by = "the options" if has_paths else " + ".join(base)
            raise UserError(f"{named_by}: {', '.join(missing)} do not exist; check the paths")
        return config, sources
    if has_paths:
        return _read_config([_config_of_run(given) or str(ROOT / FULL)]), given
    config = _read_config([str(ROOT / FULL)])
    sources = _from_config(config)
    missing = [path for path in sources.paths() if not path or not Path(path).exists()]
    if not missing:
        return config, sources
    logger.info(
        "%s names weights that are not there: %s. How to get them: 'Getting the 2B weights' in "
        "README.md. The bundled model instead, by %s",
        FULL,
        ", ".join(map(str, missing)),
        BUNDLED,
    )
    config = _read_config([str(ROOT / BUNDLED)])
    return config, _from_config(config)


def _config_of_run(given: Sources) -> str | None:
    """The training_config.yaml of the run that the transformer is of."""
    if given.transformer is None:
        return None
    path = find_transformer(given.transformer, option=given.name("transformer")).path
    for folder in list(path.parents)[:2]:
        if (folder / "training_config.yaml").is_file():
            return str(folder / "training_config.yaml")
    return None
