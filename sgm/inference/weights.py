"""Whether the weights that a configuration names are there, found out before any are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgm.errors import UserError, mistyped_as
from sgm.lora_choice import LoraChoice
from sgm.util import TARGET_ALIASES

T5_EMBEDDER = "sgm.modules.encoders.modules.FrozenT5Embedder"


def check_weight_paths(
    model: Mapping[str, Any],
    load: str | None,
    *,
    lora: Sequence[LoraChoice] = (),
    random_transformer: bool = False,
) -> None:
    """Check `load`, `lora`, the autoencoder's `ckpt_path` and every T5 embedder's `model_dir`.

    A part without a file would start from random weights, and its output would be noise.

    Args:
        model: the `model` section; with ``latent_input: true`` no autoencoder is needed.
        load: `args.load`.
        lora: `args.lora`, merged into these weights; that they hold LoRAs is checked too.
        random_transformer: `load` is not needed, the transformer is trained from nothing.

    Raises:
        UserError: a path is not set, or nothing of the expected kind is there.
    """
    if not random_transformer:
        # Imports PyTorch, which a mistake on the command line need not wait for.
        from sgm.checkpoint import check_transformer

        if not load:
            raise UserError(
                "args.load is not set: it must name the folder of the transformer's weights"
            )
        check_transformer(load)
    if lora:
        from sgm.checkpoint import read_lora

        for choice in lora:
            read_lora(choice.path, tell=False)  # whoever merges it tells
    if not model.get("latent_input"):
        where = "first_stage_config"
        if model.get(where) is None:
            raise UserError(f"model lacks {where}{mistyped_as(where, model)}; add it")
        path = weight_path(model[where], "ckpt_path", where=where)
        from sgm.checkpoint import vae_files

        vae_files(path)
    for where, path in t5_folders(model):
        if not path.is_dir():
            raise UserError(
                f"model.{where}.params.model_dir: the T5 folder {path} does not exist (model_dir "
                f"{str(path)!r} is not a folder); README tells where to get it"
            )
        from sgm.checkpoint.text_encoder import find_t5

        find_t5(path)


def t5_folders(model: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Every T5 embedder of a `model` section: where its node stands, and its `model_dir`.

    Raises:
        UserError: that is not set.
    """
    conditioner = model.get("conditioner_config")
    params = conditioner.get("params") if isinstance(conditioner, Mapping) else None
    embedders = params.get("emb_models") if isinstance(params, Mapping) else None
    for index, node in enumerate(embedders if isinstance(embedders, list | tuple) else []):
        target = node.get("target") if isinstance(node, Mapping) else None
        if isinstance(target, str) and TARGET_ALIASES.get(target, target) == T5_EMBEDDER:
            where = f"conditioner_config.params.emb_models[{index}]"
            yield where, weight_path(node, "model_dir", where=where)


def weight_path(node: Any, key: str, *, where: str) -> Path:
    """The path under `key` of a node's params; UserError where there is none.

    Args:
        node: of the autoencoder or of a text encoder; None where the section lacks it.
        key: of its params.
        where: its place within the section `model`.
    """
    params = node.get("params") if isinstance(node, Mapping) else None
    value = params.get(key) if isinstance(params, Mapping) else None
    if not value or not isinstance(value, str):
        what = mistyped_as(key, params) or f" (it is {value!r})"
        raise UserError(
            f"model.{where}.params.{key} is not set{what}: it must be the path of the weights; "
            "without them that part of the model would be random"
        )
    return Path(value).expanduser()
