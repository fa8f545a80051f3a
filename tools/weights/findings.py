"""What is to be said of a transformer, an autoencoder, a LoRA or a text encoder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch
from torch import Tensor

from sgm.checkpoint.find import find_lora, find_t5
from sgm.checkpoint.lora import check_whole_lora, read_lora
from sgm.checkpoint.strict_loading import differences
from sgm.checkpoint.table import Part
from sgm.checkpoint.tensors import on_meta
from sgm.checkpoint.text_encoder import check_t5
from sgm.checkpoint.transformer import fingerprint, read_transformer
from sgm.checkpoint.vae import load_vae_state
from sgm.errors import UserError, first_of
from sgm.util import build_on_meta
from tools.weights.sizes import model_of, sizes_of, wanted_of, without_positions

_NOT_IN_SUMMARY = ("checkpoints", "file", "family", "on disk", "channels", "text", "blocks")
# Of CogVideoX-5B and of 1.5.
_FIVE_B = {"num_layers": 42, "num_attention_heads": 48, "attention_head_dim": 64}
_TEXT_WEIGHT = "mixins.patch_embed.text_proj.weight"


@dataclass
class Finding:
    """What is known of a file or folder.

    Args:
        kind: what it is, as a noun.
        facts: (name, value) in the order in which they are shown.
        use: how it loads, or what it is a part of; empty where it does not load.
        problem: why it does not load; empty where it does.
        next_steps: lines of a configuration and commands that use it.
    """

    kind: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    use: str = ""
    problem: str = ""
    next_steps: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Kind and facts in one line."""
        facts = (f"{name} {value}" for name, value in self.facts if name not in _NOT_IN_SUMMARY)
        return ", ".join([self.kind, *facts])


def few(names: Sequence[str]) -> str:
    """The first of `names`, and how many there are if these are not all."""
    shown = first_of(names)
    return f"{shown} ({len(names)})" if shown.endswith("…") else shown


def describe_transformer(path: Path, known: Sequence[KnownModel], *, given: str | Path) -> Finding:
    """A transformer of SAT or diffusers.

    Args:
        path: the file, or diffusers' folder.
        known: the models to compare with.
        given: what to name in commands.

    Raises:
        UserError: it cannot be read, or is none.
    """
    place, base, lora = read_transformer(path)
    shapes = on_meta(base)
    comparison = compare(shapes, "transformer", known)
    folder, sizes = place.is_dir(), _sizes("transformer", shapes)
    family = f"{fingerprint(base)} (of biases and norms, which a merged LoRA leaves as they are)"
    finding = Finding(
        f"transformer in {'diffusers' if folder else 'SAT'} format",
        [*_size_facts("transformer", sizes), *_amounts(shapes), ("family", family)],
    )
    _judge(finding, comparison, sizes)
    if lora:
        rank = min(next(iter(lora.values())).shape, default=0)
        finding.facts.append(("LoRA", f"{len(lora)} matrices of rank {rank} beside the weights"))
        if finding.use:
            finding.use += f" and a lora_config with r: {rank} under model"
    if comparison.fits:
        finding.next_steps.append(
            f"bash inference.sh {comparison.known.config} --load {quote(str(given))}"
        )
    if comparison.is_whole and not folder:
        finding.next_steps.append(
            f"python tools/convert_weight_sat2hf.py --transformer_ckpt_path {quote(str(given))} "
            f"--output_path DIR --base {comparison.known.config}"
        )
    return finding


def describe_vae(path: Path, known: Sequence[KnownModel], *, given: str | Path) -> Finding:
    """A video autoencoder of SAT or diffusers; as `describe_transformer`."""
    shapes = on_meta(load_vae_state(path))
    comparison = compare(shapes, "vae", known)
    kind = "diffusers" if path.is_dir() else "SAT"
    finding = Finding(f"video autoencoder (VAE) in {kind} format")
    sizes = _sizes("vae", shapes)
    finding.facts = [*_size_facts("vae", sizes), *_amounts(shapes)]
    _judge(finding, comparison, sizes)
    if comparison.fits:
        finding.next_steps.append(
            f"model.first_stage_config.params.ckpt_path: {quote(str(given))} "
            f"in {comparison.known.config}"
        )
    return finding


def _sizes(part: Part, shapes: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes that weights tell, as `sizes_of`; none where they do not tell them."""
    try:
        return sizes_of(shapes, part, "")
    except UserError:
        return {}


def _size_facts(part: Part, sizes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts on `_sizes`."""
    if not sizes:
        return []
    if part == "vae":
        widths = sizes["block_out_channels"]
        return [
            ("levels", f"{len(widths)} of width {', '.join(map(str, widths))}"),
            ("blocks", f"{sizes['layers_per_block']} a level"),
            ("latents", f"{sizes['latent_channels']} channels"),
        ]
    heads, head = sizes["num_attention_heads"], sizes["attention_head_dim"]
    return [
        ("layers", str(sizes["num_layers"])),
        ("width", f"{heads * head}, {heads} heads of {head}"),
        ("channels", f"{sizes['in_channels']} in, {sizes['out_channels']} out"),
        ("text", f"embeddings of width {sizes['text_embed_dim']}"),
    ]


def _amounts(shapes: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Parameters, bytes and precision."""
    parameters = sum(shape.numel() for shape in shapes.values())
    size = sum(shape.numel() * shape.element_size() for shape in shapes.values())
    dtypes = Counter(str(shape.dtype).removeprefix("torch.") for shape in shapes.values())
    told = [f"{dtype} ({count} tensors)" for dtype, count in dtypes.most_common()]
    return [
        ("parameters", f"{_rounded(parameters)}, {_rounded(size, ' kMG')}B"),
        ("dtype", next(iter(dtypes), "none") if len(dtypes) < 2 else ", ".join(told)),
    ]


def _rounded(number: int, units: str = " kMB") -> str:
    """A number of three digits and a letter, of which there is one per factor of a thousand."""
    largest = len(units) - 1
    power = next((i for i in range(largest) if number < 999.5 * 1000**i), largest)
    return f"{number / 1000**power:.3g} {units[power]}".rstrip()


def _judge(finding: Finding, comparison: Comparison, sizes: Mapping[str, Any]) -> None:
    """What is absent or extra, and whether it loads."""
    missing, extra, misshapen = (
        comparison.differences[kind] for kind in ("missing", "unknown", "of another shape")
    )
    finding.facts.append(("absent", few(missing) or "nothing"))
    finding.facts.append(("extra", few(extra) or "nothing"))
    if misshapen:
        finding.facts.append(("other shape", few(misshapen)))
    nearest = comparison.known.config
    if comparison.fits:
        finding.use = f"with {nearest}"
    elif _FIVE_B.items() <= sizes.items():
        finding.problem = "these are CogVideoX-5B's sizes, and only 2B's positions are known here"
    elif comparison.is_whole:
        finding.use = (
            "with a configuration of these sizes; no file of configs/ has them, the nearest is "
            f"{nearest}"
        )
    else:
        finding.problem = f"it differs from the model that is nearest, {nearest}, as said above"


def describe_lora(
    path: Path, known: Sequence[KnownModel], *, given: str | Path, is_sat: bool
) -> Finding:
    """A LoRA of SAT, or else of diffusers or peft; as `describe_transformer`."""
    try:
        matrices, record = read_lora(path, tell=False)
    except UserError as error:
        if is_sat:
            raise
        return _describe_other_lora(path, str(error))
    width = next((m.shape[-1] for name, m in matrices.items() if ".matrix_A." in name), 0)
    numbers = (re.search(r"\.layers\.([0-9]{1,4})\.", name) for name in matrices)
    blocks = sorted({int(number[1]) for number in numbers if number})
    alpha = record.lora_alpha
    finding = Finding(
        f"LoRA in {'SAT' if is_sat else 'diffusers or peft'} format",
        [
            ("rank", str(record.r)),
            (
                "alpha",
                "not told, so 1 is taken"
                if alpha is None
                else f"{alpha:g}, so the update is {alpha / record.r:g} · B A",
            ),
            ("layers", _ranges(blocks)),
            ("width", str(width)),
            *_amounts(on_meta(matrices)),
            ("base model", _named_base(record.base, known)),
        ],
    )
    try:
        check_whole_lora(matrices, record, given)
    except UserError as error:
        finding.problem = str(error)
        return finding
    model = next((model for model in known if _takes_lora(model, width, blocks)), None)
    if model is None:
        finding.use = f"on a CogVideoX-2B of width {width}; no file of configs/ describes one"
        return finding
    finding.use = f"on the model of {model.config}"
    finding.next_steps.append(f"bash inference.sh {model.config} --lora {quote(str(given))}")
    finding.next_steps.append(
        f"python tools/export_sat_lora_weight.py --sat_pt_path {quote(str(given))} "
        "--lora_save_directory DIR"
        if is_sat
        else f"python tools/import_lora.py --lora_path {quote(str(given))} --output_path DIR"
    )
    return finding


def _describe_other_lora(path: Path, problem: str) -> Finding:
    """A LoRA of diffusers or peft that does not load, as far as its names tell."""
    (file,) = find_lora(path).files
    shapes = on_meta(file.tensors(wrapper="module"))
    downs = {n: t for n, t in shapes.items() if ".lora_A." in n and t.ndim == 2}
    ranks = sorted({tensor.shape[0] for tensor in downs.values()})
    ends = sorted({re.sub(r"^.*?[0-9]+\.|\.lora_A\..*$", "", name) for name in downs})
    is_dora = any("lora_magnitude_vector" in name or "dora_scale" in name for name in shapes)
    facts = [
        ("rank", ", ".join(map(str, ranks)) or "not told"),
        ("layers", f"{len(downs)}: {few(ends)}" if downs else "not told"),
        *_amounts(shapes),
    ]
    kind = f"{'DoRA' if is_dora else 'LoRA'} in diffusers or peft format"
    return Finding(kind, facts, problem=problem)


def _takes_lora(model: KnownModel, width: int, blocks: Sequence[int]) -> bool:
    layer = f"transformer.layers.{max(blocks, default=0)}.input_layernorm.weight"
    return layer in model.transformer and model.transformer[layer].shape == (width,)


def _ranges(numbers: Sequence[int]) -> str:
    """How many, and from where to where."""
    if not numbers:
        return "none"
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{len(numbers)}, {'' if whole else 'among '}{numbers[0]} to {numbers[-1]}"


def _named_base(base: str | None, known: Sequence[KnownModel]) -> str:
    """The fingerprint of the model that a LoRA was trained on, and where that model is."""
    if base is None:
        return "not told"
    for model in known:
        if model.load and Path(model.load).exists():
            try:
                _, weights, _ = read_transformer(model.load)
            except UserError:  # it is not what is inspected
                continue
            if fingerprint(weights) == base:
                return f"{base} (that in {model.load})"
    return base


def describe_t5(given: Path, known: Sequence[KnownModel]) -> Finding:
    """A folder with T5, `given`; `known` as in `describe_transformer`."""
    files = find_t5(given)
    shapes: dict[str, Tensor] = {}
    for file in files.files:
        shapes |= on_meta(file.tensors(wrapper="state_dict"))
    finding = Finding(
        "T5 text encoder",
        [
            ("layers", str(files.config.get("num_layers"))),
            ("width", f"{files.config.get('d_model')}, {files.config.get('num_heads')} heads"),
            *_amounts(shapes),
        ],
    )
    try:
        check_t5(files, dtype=torch.float32)
    except UserError as error:
        finding.problem = str(error)
        return finding
    for model in known:
        if model.transformer[_TEXT_WEIGHT].shape[1] == files.config.get("d_model"):
            finding.use = f"with {model.config}"
            finding.next_steps = [f"model_dir: {quote(str(given))} in {model.config}"]
            return finding
    width = files.config.get("d_model")
    finding.use = f"with a transformer for text of width {width}; no file of configs/ has one"
    return finding


@dataclass(frozen=True, eq=False)
class KnownModel:
    """A model that a configuration describes.

    Args:
        config: the configuration's file, as a user would name it.
        model: its `model` section.
        load: where its transformer's weights should be.
    """

    config: str
    model: Mapping[str, Any]
    load: str | None

    @cached_property
    def transformer(self) -> dict[str, Tensor]:
        """Names and shapes of the transformer; on the meta device."""
        return build_on_meta(self.model["network_config"]).state_dict()

    @cached_property
    def vae(self) -> dict[str, Tensor]:
        """Names and shapes of the autoencoder; on the meta device."""
        return build_on_meta(self.model["first_stage_config"]).state_dict()


@dataclass(frozen=True)
class Comparison:
    """How weights relate to the known model that is nearest to them.

    Args:
        known: that model.
        fits: whether its configuration takes the weights as they are.
        differences: of the weights from a model of that kind with the sizes that they tell, or
            from the known one if they do not: kind → names, as of
            `sgm.checkpoint.strict_loading.differences`.
    """

    known: KnownModel
    fits: bool
    differences: Mapping[str, list[str]]

    @property
    def is_whole(self) -> bool:
        """Whether the weights are all that a model of some sizes has, and no more."""
        return not any(self.differences.values())


def compare(
    shapes: Mapping[str, Tensor], part: Literal["transformer", "vae"], known: Sequence[KnownModel]
) -> Comparison:
    """Find the known model that is nearest to weights, and what they have more or less than it.

    Args:
        shapes: name in SAT → tensor, on the meta device.
        part: what they are.
        known: one at least.
    """
    found = {m: differences(shapes, wanted_of(getattr(m, part), shapes)) for m in known}
    nearest = min(known, key=lambda model: sum(map(len, found[model].values())))
    if not any(found[nearest].values()):
        return Comparison(nearest, True, found[nearest])
    try:
        own = model_of(sizes_of(shapes, part, ""), part, where="").state_dict()
    except UserError:  # they tell no sizes, or ones that no model can have
        return Comparison(nearest, False, found[nearest])
    rest = differences(without_positions(shapes), without_positions(own))
    return Comparison(nearest, False, rest)
