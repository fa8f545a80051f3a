"""The table of names: bijective to the bit, and its names those of both code bases' modules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgm.checkpoint.table import to_diffusers, to_sat
from sgm.checkpoint.tensors import LazyTensors, on_meta
from sgm.checkpoint.transformer import MODEL_PREFIX, POSITION_TABLE, is_lora_matrix
from sgm.errors import UserError
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.util import instantiate_from_config
from tests.checkpoint.test_transformer import network_config

DATA = Path(__file__).parents[1] / "data"
DTYPES = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# Layers, width, heads.
TRANSFORMERS = [(1, 32, 1), (2, 64, 4), (11, 48, 2)]
# Width, factors of the levels, blocks in each, channels of the latents.
VAES = [(32, [1, 2], 1, 4), (32, [1, 3, 2], 2, 5), (32, [1, 2, 1, 3], 3, 3)]
CASES = [
    *(("transformer", size) for size in TRANSFORMERS),
    *(("vae", size) for size in VAES),
    *(("lora", size) for size in TRANSFORMERS),
]


def build_transformer(num_layers: int, width: int, heads: int) -> nn.Module:
    """A transformer with LoRA layers."""
    config = network_config(r=3)
    config["params"] |= {"num_layers": num_layers, "hidden_size": width}
    config["params"]["num_attention_heads"] = heads
    network = instantiate_from_config(config)
    network.add_lora()
    return network


def build_vae(ch: int, ch_mult: list[int], num_res_blocks: int, z_channels: int) -> nn.Module:
    """An autoencoder on the meta device."""
    params = {"ch": ch, "ch_mult": ch_mult, "num_res_blocks": num_res_blocks}
    params["z_channels"] = z_channels
    part = "sgm.modules.autoencoding"
    with torch.device("meta"):
        return VideoAutoencoderInferenceWrapper(
            {"target": f"{part}.encoder.ContextParallelEncoder3D", "params": params},
            {"target": f"{part}.decoder.ContextParallelDecoder3D", "params": params},
            regularizer_config={"target": f"{part}.regularizers.DiagonalGaussianRegularizer"},
        )


def sat_shapes(part: str, size: tuple[Any, ...]) -> dict[str, Tensor]:
    """Name in SAT → meta tensor, of this project's own modules."""
    if part == "vae":
        return build_vae(*size).state_dict()
    state = build_transformer(*size).to("meta").state_dict()
    del state[POSITION_TABLE]
    if part == "lora":
        return {name: tensor for name, tensor in state.items() if is_lora_matrix(name)}
    return {n.replace(".original.", "."): t for n, t in state.items() if not is_lora_matrix(n)}


def random_bits(shapes: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Any bits at all, also those of infinities and of every kind of NaN."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.iinfo(DTYPES[dtype])
    return {
        name: torch.randint(
            whole.min, whole.max, tensor.shape, dtype=DTYPES[dtype], generator=generator
        ).view(dtype)
        for name, tensor in shapes.items()
    }


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(*(t.view(DTYPES[tensor.dtype]) for t in (other, tensor))), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("part", "size"), CASES)
def test_round_trips_keep_every_bit(part, size, dtype):
    sat = random_bits(sat_shapes(part, size), dtype)
    there = to_diffusers(sat, part, where="sat")
    assert_same_bits(to_sat(there, part, where="diffusers"), sat)

    diffusers = random_bits(there, dtype)
    back = to_sat(diffusers, part, where="diffusers")
    assert back.keys() == sat.keys()
    assert_same_bits(to_diffusers(back, part, where="sat"), diffusers)


def their_transformer(num_layers: int, width: int, heads: int) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.CogVideoXTransformer3DModel(
            num_layers=num_layers, num_attention_heads=heads, attention_head_dim=width // heads,
            in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=6, sample_width=6,
            sample_height=4, sample_frames=9,
        )  # fmt: skip


@pytest.mark.parametrize("size", TRANSFORMERS)
def test_transformers_have_diffusers_own_names_and_shapes(size):
    theirs = their_transformer(*size)
    tensors = dict(to_diffusers(sat_shapes("transformer", size), "transformer", where="sat"))
    theirs.load_state_dict(tensors, strict=True, assign=True)


@pytest.mark.parametrize("size", VAES)
def test_autoencoders_have_diffusers_own_names_and_shapes(size):
    diffusers = pytest.importorskip("diffusers")
    ch, ch_mult, num_res_blocks, z_channels = size
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLCogVideoX(
            block_out_channels=[ch * factor for factor in ch_mult],
            down_block_types=["CogVideoXDownBlock3D"] * len(ch_mult),
            up_block_types=["CogVideoXUpBlock3D"] * len(ch_mult),
            layers_per_block=num_res_blocks,
            latent_channels=z_channels,
        )
    tensors = dict(to_diffusers(sat_shapes("vae", size), "vae", where="sat"))
    theirs.load_state_dict(tensors, strict=True, assign=True)


@pytest.mark.parametrize("size", TRANSFORMERS)
def test_lora_matrices_belong_to_diffusers_own_layers(size):
    layers = dict(their_transformer(*size).named_modules())
    matrices = to_diffusers(sat_shapes("lora", size), "lora", where="sat")
    assert len(matrices) == size[0] * 4 * 2  # q, k, v and the output, each with A and B
    for name, matrix in matrices.items():
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        out_size, in_size = layers[layer].weight.shape
        assert list(matrix.shape) == ([3, in_size] if kind == "lora_A" else [out_size, 3]), name


def listed_shapes(file: str, num_layers: int) -> dict[str, Tensor]:
    """Names and shapes of the published 2B weights, as meta tensors."""
    return {
        name.removeprefix(MODEL_PREFIX).replace("{i}", str(i)): torch.empty(shape, device="meta")
        for name, shape in json.loads((DATA / file).read_text()).items()
        for i in range(num_layers)
    }


@pytest.mark.parametrize(
    ("part", "file", "class_name"),
    [
        ("transformer", "transformer_2b_keys.json", "CogVideoXTransformer3DModel"),
        ("vae", "vae_keys.json", "AutoencoderKLCogVideoX"),
    ],
)
def test_2b_has_the_names_and_shapes_of_diffusers_defaults(part, file, class_name):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = getattr(diffusers, class_name)()
    listed = {n: t for n, t in listed_shapes(file, 30).items() if not n.startswith("loss.")}
    found = to_diffusers(listed, part, where="2B")
    theirs.load_state_dict(dict(found), strict=True, assign=True)
    back = to_sat(theirs.state_dict(), part, where="theirs")
    shapes = {name: tensor.shape for name, tensor in listed.items() if name != POSITION_TABLE}
    assert {name: tensor.shape for name, tensor in back.items()} == shapes


def test_shapes_are_told_without_reading_a_tensor():
    shapes = sat_shapes("transformer", TRANSFORMERS[0])

    def must_not_be_read() -> Tensor:
        raise AssertionError

    unread = LazyTensors(dict.fromkeys(shapes, must_not_be_read), meta=shapes)
    back = to_sat(to_diffusers(unread, "transformer", where="a"), "transformer", where="b")
    found = on_meta(back)
    assert {n: found[n].shape for n in found} == {n: t.shape for n, t in shapes.items()}
    with pytest.raises(AssertionError):
        back["time_embed.0.weight"]
    plain = on_meta({"a": torch.ones(2, dtype=torch.float16)})["a"]
    assert (plain.is_meta, plain.shape, plain.dtype) == (True, (2,), torch.float16)


BLOCK = "transformer_blocks.0.attn1"
MISTAKES = {
    "unknown to SAT": (
        to_diffusers,
        {"a": [2], "b": [2], "c": [2], "d": [2]},
        r"file: 4 tensor names do not belong to a .*transformer in SAT format \(a, b, c, …\)",
    ),
    "unknown to diffusers": (to_sat, {"time_embed.0.bias": [2]}, "1 tensor .* diffusers format"),
    "does not divide": (
        to_diffusers,
        {"transformer.layers.0.attention.query_key_value.bias": [8]},
        r"of \[8\], which cannot be split into 3",
    ),
    "a part is absent": (
        to_sat,
        {f"{BLOCK}.to_q.bias": [2], f"{BLOCK}.to_v.bias": [2]},
        r"has transformer_blocks.0.attn1.to_q.bias, but no .*to_k",
    ),
    "parts of different sizes": (
        to_sat,
        {f"{BLOCK}.to_q.bias": [2], f"{BLOCK}.to_k.bias": [1], f"{BLOCK}.to_v.bias": [3]},
        r"to_q.bias \[2\], .*to_k.bias \[1\], .* do not match",
    ),
    "parts without an axis": (
        to_sat,
        {f"{BLOCK}.to_q.bias": [], f"{BLOCK}.to_k.bias": [], f"{BLOCK}.to_v.bias": []},
        "do not match",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_weights_of_something_else_are_one_sentence(kind):
    convert, shapes, words = MISTAKES[kind]
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with pytest.raises(UserError, match=words) as failure:
        dict(convert(tensors, "transformer", where="file"))
    assert "\n" not in str(failure.value)
