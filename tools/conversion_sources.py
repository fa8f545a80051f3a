"""What tools/convert_weight_sat2hf.py converts, and the configuration that describes it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from arguments import Config, SamplingArgs, parse_config
from tools.choose_config import BUNDLED, FULL

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
_CKPT_PATH = "model.first_stage_config.params.ckpt_path"
_EMBEDDERS = "model.conditioner_config.params.emb_models"


@dataclass
class Sources:
    """Where the parts of a pipeline are; None for a part that is not written."""

    transformer: str | None
    vae: str | None
    text_encoder: str | None


def select(config: Config, key: str, default: Any = None) -> Any:
    """The value of a dotted key of ``args`` or ``model``; `default` where it is absent or null."""
    node = OmegaConf.create({"args": vars(config.args) | {"lora": None}, "model": config.model})
    value = OmegaConf.select(node, key)
    return default if value is None else value


def _from_config(config: Config) -> Sources:
    """The paths that a configuration names; those of shipped ones lie in the repository."""
    embedders = select(config, _EMBEDDERS, [])
    text = next((node.params.model_dir for node in embedders if "params" in node), None)
    paths = [select(config, "args.load"), select(config, _CKPT_PATH), text]
    found = []
    for path in paths:
        own = Path(path).expanduser() if path else None
        is_shipped = own is not None and not own.exists() and (ROOT / own).exists()
        found.append(str(ROOT / own) if is_shipped else path)
    return Sources(*found)


def _read_config(files: Sequence[str]) -> Config:
    return parse_config(SamplingArgs, "", ["--base", *files])


def choose_sources(given: Sources, base: Sequence[str] | None) -> tuple[Config, Sources]:
    """The configuration of a conversion, and what is converted.

    Args:
        given: the options; where all are None, the configuration names the paths.
        base: the option, or None: then the run's own configuration, the 2B model's, or, where no
            path is given and the 2B weights are not there, the bundled model's.

    Raises:
        UserError: a configuration is wrong, or the transformer does not exist.
    """
    has_paths = any(vars(given).values())
    if base:
        config = _read_config(base)
        return config, given if has_paths else _from_config(config)
    if has_paths:
        return _read_config([_config_of_run(given.transformer) or str(ROOT / FULL)]), given
    config = _read_config([str(ROOT / FULL)])
    sources = _from_config(config)
    missing = [path for path in vars(sources).values() if not path or not Path(path).exists()]
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


def _config_of_run(transformer: str | None) -> str | None:
    """The training_config.yaml of the run that a checkpoint is of."""
    from sgm.checkpoint.transformer import find_transformer_file

    if transformer is None:
        return None
    for folder in list(find_transformer_file(transformer).parents)[:2]:
        if (folder / "training_config.yaml").is_file():
            return str(folder / "training_config.yaml")
    return None
