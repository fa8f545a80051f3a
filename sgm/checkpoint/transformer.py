"""The weights of the diffusion transformer: finding the file, sorting its keys, filling a model."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sgm.checkpoint.diffusers_folder import find_diffusers_part, read_diffusers_part
from sgm.checkpoint.lora_formats import find_foreign_file, is_foreign
from sgm.checkpoint.reading import check_weight_file, read_checkpoint, tensors_of
from sgm.checkpoint.strict_loading import check_fit
from sgm.checkpoint.table import POSITION_TABLE, to_sat
from sgm.checkpoint.tensors import on_meta
from sgm.errors import UserError

if TYPE_CHECKING:
    from sgm.models.transformer import DiffusionTransformer

logger = logging.getLogger(__name__)

MODEL_PREFIX = "model.diffusion_model."
MODEL_FILES = ("mp_rank_00_model_states.pt", "mp_rank_00_model_states.safetensors")
# Of a checkpoint of the whole engine, what belongs to other parts.
OTHER_PARTS = ("conditioner.", "first_stage_model.", "loss.", "loss_fn.", "denoiser.", "model_ema.")
_LONGEST_QUOTE = 60  # characters of a wrong text that a message repeats
_HINT = "use the configuration that belongs to these weights"
_FOREIGN_FILES = "pytorch_lora_weights.safetensors or adapter_model.safetensors"
Kind = Literal["load", "lora"]
_EXPECTED: Mapping[Kind, str] = {
    "load": "the transformer's folder (with the file 'latest' in it), its .pt file or a diffusers "
    "folder; README tells where to get the weights",
    "lora": "a LoRA: the folder of a run (with the file 'latest' in it), of one of its "
    f"checkpoints, a file, or what diffusers or peft wrote: {_FOREIGN_FILES}, or its folder",
}


def find_transformer_file(
    load: str | Path, *, kind: Kind = "load", option: str | None = None
) -> Path:
    """The file that `load` means: a file itself, a folder with ``latest``, or the folder it names.

    Args:
        load: the path.
        kind: what is looked for. For ``load`` it may also be a diffusers folder, of a pipeline or
            of its transformer, and the transformer's folder is returned.
        option: where the user gave the path, for messages; None: the name of `kind`.

    Raises:
        UserError: there is no such file; says which one was looked for.
    """
    option = option or kind
    try:
        return _find_transformer_file(load, kind, option)
    except OSError as error:  # a name that is too long, a folder of somebody else …
        raise UserError(
            f"{option}: {str(load)[:_LONGEST_QUOTE]!r} cannot be looked up ({error.strerror}); "
            "check the path and its permissions"
        ) from None


def _find_transformer_file(load: str | Path, kind: Kind, option: str) -> Path:
    path = Path(os.path.expanduser(load))
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{option}: {load} does not exist; it must be {_EXPECTED[kind]}")
    folder = path
    if (path / "latest").is_file():
        tag = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if any(mark in tag for mark in "/\n\0"):
            raise UserError(
                f"{option}: {path}/latest holds {tag[:_LONGEST_QUOTE]!r}, not just the name of a "
                "folder beside it; write or download it again"
            )
        folder = path / tag
    for name in MODEL_FILES:
        if (folder / name).is_file():
            return folder / name
    if kind == "load" and folder == path:
        found = find_diffusers_part(path, "transformer")
        if found is not None:
            return found
        if find_foreign_file(path):
            raise _is_no_base(path, option)
        if any((path / "transformer" / name).is_file() for name in ("latest", *MODEL_FILES)):
            raise UserError(
                f"{option}: {path} is the folder of a whole model in SAT's layout; name "
                f"{path / 'transformer'}"
            )
    or_else = "a diffusers folder with its config.json" if kind == "load" else _FOREIGN_FILES
    raise UserError(
        f"{option}: {folder / MODEL_FILES[0]} does not exist; expected are {path}/latest with the "
        f"name of a folder, and {MODEL_FILES[0]} in that folder; or {or_else}"
    )


def _is_no_base(path: Path, option: str) -> UserError:
    return UserError(
        f"{path} is a LoRA, not a whole model; {option} must name its base model, and --lora this "
        "(to go on with its run: --resume)"
    )


def is_lora_matrix(name: str) -> bool:
    """Whether a weight of this name is a matrix of LoRA."""
    return ".matrix_A." in name or ".matrix_B." in name


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Identity of a model's weights: 16 hexadecimal digits, the same for float32 and float16.

    Only the vectors (biases, scales of norms) take part, rounded to float16, so little is read of
    a mapped file, and nothing changes where LoRA wraps a layer. A copy rounded to bfloat16 counts
    as another model.

    Args:
        tensors: name → tensor of the transformer, with or without the checkpoint's prefix.
    """
    vectors = {
        name.removeprefix(MODEL_PREFIX).replace(".original.", "."): name
        for name, tensor in on_meta(tensors).items()
        if tensor.ndim == 1 and not name.startswith(OTHER_PARTS)
    }
    digest = hashlib.sha256()
    for plain_name, name in sorted(vectors.items()):
        digest.update(f"{plain_name}\0".encode())
        digest.update(tensors[name].detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sort_keys(
    tensors: Mapping[str, Tensor], path: Path, *, kind: Kind = "load", option: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The transformer's tensors of a checkpoint, as (base weights, LoRA matrices).

    Names come out as the plain model's: without prefix, and without ``original``, which LoRA puts
    before the weights of the layers it wraps.

    Args:
        tensors: of the file `path`.
        kind, option: as in `find_transformer_file`.

    Raises:
        UserError: the file holds no transformer, or one of diffusers, or a LoRA of it.
    """
    option = option or kind
    if any(name.startswith(MODEL_PREFIX) for name in tensors):
        own = {
            name.removeprefix(MODEL_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(MODEL_PREFIX)
        }
        rest = [n for n in tensors if not n.startswith((MODEL_PREFIX, *OTHER_PARTS))]
        if rest:
            logger.warning("%s: %d unknown keys are not used: %s …", path, len(rest), rest[0])
    else:
        own = {n: tensor for n, tensor in tensors.items() if not n.startswith(OTHER_PARTS)}
    if kind == "load" and is_foreign(own):
        raise _is_no_base(path, option)
    if any(name.startswith("transformer_blocks.") for name in own):
        raise UserError(
            f"{path} has diffusers' names; {option} must name its folder, with config.json beside "
            "it"
        )
    if not any(name.startswith(("transformer.", "mixins.")) for name in own):
        raise UserError(
            f"{path} holds no transformer of SAT format (first key: {next(iter(tensors))!r}); "
            f"{option} must be {_EXPECTED[kind]}"
        )
    lora = {n: t for n, t in own.items() if is_lora_matrix(n)}
    base = {n.replace(".original.", "."): t for n, t in own.items() if n not in lora}
    return base, lora


def fill_lora(network: DiffusionTransformer, lora: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy the matrices of the file `path` into a network that has its LoRA layers.

    Raises:
        UserError: they are of other layers or another rank.
    """
    wanted = {n: p for n, p in network.named_parameters() if is_lora_matrix(n)}
    check_fit(lora, wanted, path=path, hint=_HINT)
    with torch.no_grad():
        for name, matrix in lora.items():
            wanted[name].copy_(matrix)


def _add_lora(network: DiffusionTransformer, lora: Mapping[str, Tensor], path: Path) -> None:
    """Wrap the layers that LoRA changes, and fill the matrices if the file holds them."""
    if network.lora_config:
        network.add_lora()
        if lora:
            fill_lora(network, lora, path)
        else:
            logger.debug("%s holds no LoRA matrices: LoRA starts from zero", path)
    elif lora:
        name, matrix = next(iter(lora.items()))
        raise UserError(
            f"{path} holds LoRA matrices of rank {min(matrix.shape)} ({name} …), but the "
            "configuration has no lora_config; add it under model with that r"
        )


def read_transformer(
    load: str | Path, *, option: str | None = None
) -> tuple[Path, Mapping[str, Tensor], dict[str, Tensor]]:
    """The tensors of a transformer in whichever format, under the names of the plain model.

    Args:
        load, option: as in `find_transformer_file`.

    Returns:
        The file, or the folder of diffusers' transformer; the base weights, mapped from disk or
        put together when asked for; the LoRA matrices.

    Raises:
        UserError: no such file, not weights, no CogVideoX-2B, or a LoRA without its base.
    """
    path = find_transformer_file(load, option=option)
    if path.is_dir():
        _, tensors = read_diffusers_part(path, "transformer")
        return path, to_sat(tensors, "transformer", where=path), {}
    tensors = tensors_of(read_checkpoint(path), path, wrapper="module")
    base, lora = sort_keys(tensors, path, option=option)
    if not base:
        raise _is_no_base(path, option or "load")
    return path, base, lora


def check_transformer(load: str | Path) -> None:
    """Find out early whether `load` leads to weights, as far as that takes no time.

    Raises:
        UserError: it does not, or to a file that is damaged, or a diffusers folder of another model
            or with something absent.
    """
    path = find_transformer_file(load)
    if path.is_dir():
        read_transformer(path)
    else:
        check_weight_file(path)


def load_transformer(
    network: DiffusionTransformer,
    load: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
) -> str:
    """Fill a transformer that was built on the meta device with weights of SAT or diffusers.

    Tensors go from the mapped file straight to `device` and `dtype`, one by one, so that host
    memory never holds a second copy. Layers are wrapped for LoRA afterwards, where configured.

    Returns:
        The `fingerprint` of the file's weights, which `dtype` has not rounded yet.

    Raises:
        UserError: no such file, not weights, or weights of another model.
    """
    path, base, lora = read_transformer(load)
    wanted = network.state_dict()
    computed = {}
    if POSITION_TABLE not in base and POSITION_TABLE in wanted:
        computed[POSITION_TABLE] = network.mixins["pos_embed"].compute_table()
    check_fit({**on_meta(base), **computed}, wanted, path=path, hint=_HINT)
    placed = {
        name: tensor.to(device=device, dtype=dtype)
        for name, tensor in chain(base.items(), computed.items())
    }
    network.load_state_dict(placed, assign=True)
    _add_lora(network, lora, path)
    return fingerprint(base)
