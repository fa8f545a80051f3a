"""Names and shapes of the published 2B transformer, and what it takes to build it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgm.models.transformer import DiffusionTransformer
from sgm.util import instantiate_from_config

DATA = Path(__file__).parents[1] / "data"
TABLE = "mixins.pos_embed.pos_embedding"

Config = Callable[..., dict[str, Any]]


def expected_shapes(file: str) -> dict[str, list[int]]:
    """Names and shapes of a file in tests/data, for all 30 layers, without the engine's prefix."""
    listed = json.loads((DATA / file).read_text())
    return {
        name.removeprefix("model.diffusion_model.").replace("{i}", str(layer)): shape
        for name, shape in listed.items()
        for layer in range(30)
    }


def shapes_of(model: DiffusionTransformer) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


class HostAllocations(TorchDispatchMode):
    """Counts the bytes that operations put anywhere but on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_bytes += sum(t.nbytes for t in tensors if not t.is_meta)
        return result


def test_2b_on_meta_has_published_names_and_allocates_nothing(full_config: Config) -> None:
    with HostAllocations() as allocated, torch.device("meta"):
        model = DiffusionTransformer(**full_config(), dtype=torch.float16)
    assert allocated.num_bytes == 0
    assert shapes_of(model) == expected_shapes("transformer_2b_keys.json")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [TABLE]


def test_lora_at_2b_width_has_published_names(full_config: Config) -> None:
    # LoRA needs memory, so: one layer at full width, and little around it.
    small_rest = {"num_layers": 1, "num_frames": 1, "latent_height": 2, "latent_width": 2}
    config = {**full_config(lora={"r": 128}), **small_rest, "transformer_args": {"skip_init": True}}
    model = DiffusionTransformer(**config, dtype=torch.float16)
    base, wrapped = (
        {name: shape for name, shape in expected_shapes(file).items() if ".layers.0." in name}
        for file in ("transformer_2b_keys.json", "transformer_2b_lora_r128_keys.json")
    )
    replaced = {name.replace(".original.", ".") for name in wrapped}
    expected = {name: shape for name, shape in base.items() if name not in replaced} | wrapped
    found = {name: shape for name, shape in shapes_of(model).items() if ".layers.0." in name}
    assert found == expected


def test_2b_forward_never_looks_into_a_tensor(full_config: Config) -> None:
    # On a GPU a look into a tensor makes the CPU wait; on meta there is nothing to see, so it
    # raises. This also runs the full sizes through every reshape.
    with torch.device("meta"):
        model = DiffusionTransformer(**full_config(), dtype=torch.float16)
        x = torch.empty(2, 13, 16, 60, 90)
        timesteps = torch.empty(2, dtype=torch.int64)
        context = torch.empty(2, 226, 4096)
    with torch.no_grad():
        prediction = model(x, timesteps=timesteps, context=context)
    assert prediction.is_meta
    assert (prediction.shape, prediction.dtype) == (x.shape, x.dtype)


def test_config_node_with_old_names_builds(small_config: Config) -> None:
    config = small_config(adm_in_channels=256)
    old = {
        "pos_embed_config": "Basic3DPositionEmbeddingMixin",
        "patch_embed_config": "ImagePatchEmbeddingMixin",
        "adaln_layer_config": "AdaLNMixin",
        "final_layer_config": "FinalLayerMixin",
    }
    for node, name in old.items():
        config["modules"][node]["target"] = f"dit_video_concat.{name}"
    node = {"target": "dit_video_concat.DiffusionTransformer", "params": config}
    assert isinstance(instantiate_from_config(node), DiffusionTransformer)
