"""Write docs/configuration.md: every key of the YAML files with its type, default and meaning.

    python -m tools.document_options

The keys come from the option models in sgm/config.py and from the constructors of the classes that
configurations name. The meanings come from the descriptions of the options and from docstrings.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from sgm.config import CommonArgs, SamplingArgs, TrainingArgs
from sgm.options import Options, describe
from sgm.util import SET_BY_CODE, get_class

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

_HEAD = """# Configuration

<!-- Written by `python -m tools.document_options`: edit the texts in the code, not this file. -->

`--base` takes one or more YAML files and merges them in order: later files override earlier ones,
and flags override all files. A file has four sections: `args`, `model`, `data` and `deepspeed`.
`${args.seed}` inserts the value of another key; functions such as `${oc.env:HOME}` are not allowed.
In `args`, a key without a value keeps its default, and a single value is accepted where a list is
expected. Every key of `args` is also a flag: `sampling_fps` becomes `--sampling-fps`. The section
`deepspeed` takes [the keys of DeepSpeed](https://www.deepspeed.ai/docs/config-json/).
"""

# The documented nodes: the key of each node, and the classes that the node can name.
_PARTS = {
    "model": ["sgm.engine.SATVideoDiffusionEngine"],
    "network_config": ["sgm.models.transformer.DiffusionTransformer"],
    "network_config.params.modules": [
        "sgm.modules.transformer.patch_embedding.ImagePatchEmbeddingMixin",
        "sgm.modules.transformer.position_embedding.Basic3DPositionEmbeddingMixin",
        "sgm.modules.transformer.adaln.AdaLNMixin",
        "sgm.modules.transformer.final_layer.FinalLayerMixin",
    ],
    "first_stage_config": [
        "sgm.models.autoencoder.VideoAutoencoderInferenceWrapper",
        "sgm.modules.autoencoding.encoder.ContextParallelEncoder3D",
        "sgm.modules.autoencoding.decoder.ContextParallelDecoder3D",
    ],
    "conditioner_config": [
        "sgm.modules.GeneralConditioner",
        "sgm.modules.encoders.modules.FrozenT5Embedder",
    ],
    "denoiser_config": ["sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser"],
    "sampler_config": [
        "sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler",
        "sgm.modules.diffusionmodules.sampling.VideoDDIMSampler",
        "sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization",
        "sgm.modules.diffusionmodules.guiders.DynamicCFG",
        "sgm.modules.diffusionmodules.guiders.VanillaCFG",
    ],
    "loss_fn_config": [
        "sgm.modules.diffusionmodules.loss.VideoDiffusionLoss",
        "sgm.modules.diffusionmodules.sigma_sampling.DiscreteSampling",
    ],
    "data": ["data_video.SFTDataset"],
}


def _row(*cells: str) -> str:
    escaped = (cell.replace("|", r"\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |\n"


def _table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    head = _row("key", "type", "default", "meaning") + "| --- | --- | --- | --- |\n"
    return head + "".join(_row(f"`{key}`", *rest) for key, *rest in rows)


def option_rows(
    model: type[Options], *, without: type[Options] | None = None
) -> Iterator[tuple[str, str, str, str]]:
    """Yield the key, type, default and meaning of each field.

    Fields that the model `without` defines in the same way are skipped.
    """
    inherited = without.model_fields if without else {}
    for name, field in model.model_fields.items():
        if name in inherited and repr(inherited[name]) == repr(field):
            continue
        yield name, describe(field), _default(field.default), field.description or ""


def _default(value: object) -> str:
    if value in (None, [], (), ""):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def meanings(cls: type) -> dict[str, str]:
    """Return the meaning of each parameter, from the ``Args`` sections of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = re.search(
            r"^Args:\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(base.__doc__ or ""), re.M
        )
        entries = re.split(r"^ {4}(?=\S)", section[1], flags=re.M) if section else []
        for entry in entries:
            names, colon, text = entry.partition(": ")
            for name in re.split(r",\s*", names) if colon else []:
                found[name.strip()] = " ".join(text.split())
    return found


def parameter_rows(cls: type) -> Iterator[tuple[str, str, str, str]]:
    """Yield the key, type, default and meaning of each param of `cls` that a YAML file may set."""
    texts = meanings(cls)
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name in SET_BY_CODE:
            continue
        kind = (
            str(parameter.annotation).replace("Mapping[str, Any]", "keys").replace("Config", "keys")
        )
        default = parameter.default
        shown = "required" if default is parameter.empty else _default(default)
        yield parameter.name, f"`{kind}`", shown, texts.get(parameter.name, "")


def page() -> str:
    """Return the text of docs/configuration.md."""
    parts = [_HEAD]
    commands = {
        "both commands": (CommonArgs, None),
        "`sample_video.py`": (SamplingArgs, CommonArgs),
        "`train_video.py`": (TrainingArgs, CommonArgs),
    }
    for name, (model, without) in commands.items():
        parts.append(f"\n## `args` of {name}\n\n{_table(option_rows(model, without=without))}")
    for key, targets in _PARTS.items():
        parts.append(f"\n## `{key}`\n")
        for target in targets:
            title = "" if key == "model" else f"\n`target: {target}`\n"
            parts.append(f"{title}\n{_table(parameter_rows(get_class(target)))}")
    return "".join(parts)


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
