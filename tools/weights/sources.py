"""Choose the weights that tools/convert_weight_sat2hf.py converts, and their configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from arguments import parse_config
from sgm.checkpoint.find import find_transformer
from sgm.config import Config, SamplingArgs
from sgm.errors import UserError
from sgm.files import exists
from sgm.preflight import weight_paths
from tools.launch.choose_config import BUNDLED, FULL

logger = logging.getLogger(__name__)


ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {  # part of a pipeline → the option that sets its path
    "transformer": "--transformer_ckpt_path",
    "vae": "--vae_ckpt_path",
    "text_encoder": "--text_encoder_path",
}


def read_config(*files: str | Path) -> Config:
    """Read `files`, merge them in order, and return the checked configuration.

    Raises:
        UserError: a file is missing or invalid.
    """
    return parse_config(SamplingArgs, "", ["--base", *map(str, files)])


def choose_sources(
    given: Mapping[str, str], base: Sequence[str] | None
) -> tuple[Config, Mapping[str, str]]:
    """Choose the configuration of a conversion and the weights to convert.

    Args:
        given: the paths in the options, part → path. If `given` is empty, the paths in the
            configuration are used.
        base: the option ``--base``, or None. For None the configuration is the
            ``training_config.yaml`` of the transformer's run if there is one, otherwise the 2B
            model's. If `given` is empty too and the 2B weights do not exist, it is the bundled
            model's.

    Returns:
        The configuration, and part → path.

    Raises:
        UserError: a configuration is invalid, or weights do not exist.
    """
    if given:
        own = _config_of_run(given) or ROOT / FULL
        return read_config(*(base or (own,))), given
    config = read_config(*(base or (ROOT / FULL,)))
    sources = _paths_in(config)
    missing = ", ".join(path for path in sources.values() if not exists(path))
    if missing and base:
        raise UserError(f"{' + '.join(base)}: {missing} do not exist; check the paths")
    if missing:
        logger.info(
            "weights named in %s do not exist: %s (see 'Getting the 2B weights' in README.md); "
            "converting the bundled model of %s instead",
            *(FULL, missing, BUNDLED),
        )
        config = read_config(ROOT / BUNDLED)
        sources = _paths_in(config)
    return config, sources


def _paths_in(config: Config) -> dict[str, str]:
    """Return part → path in a configuration; missing paths are tried relative to `ROOT`."""
    vae, *texts = (named.value for named in weight_paths(config.model))
    values = (config.args.load, vae, next(filter(None, texts), None))
    found = {part: str(value) for part, value in zip(OPTIONS, values, strict=True) if value}
    for part, path in found.items():
        if not exists(path) and (ROOT / path).exists():
            found[part] = str(ROOT / path)
    return found


def _config_of_run(given: Mapping[str, str]) -> Path | None:
    """Return the training_config.yaml of the transformer's run, or None if there is no file."""
    if "transformer" not in given:
        return None
    path = find_transformer(given["transformer"], option=OPTIONS["transformer"]).path
    files = (folder / "training_config.yaml" for folder in list(path.parents)[:2])
    return next((file for file in files if file.is_file()), None)
