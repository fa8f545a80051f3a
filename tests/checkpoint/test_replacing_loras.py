"""LoRAs of a loaded model are replaced by others, with the bytes of a fresh start."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from sgm.checkpoint.lora import merge_updates, read_updates
from sgm.checkpoint.lora_formats import expected_matrices, lora_layers
from sgm.checkpoint.transformer import MODEL_PREFIX, load_transformer, read_transformer
from sgm.config import LoraChoice
from sgm.engine import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.util import build_on_meta, check_params
from tests.lora_models import merge_loras

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "cogvideox_tiny_infer.yaml"
LOAD = ROOT / "CogVideoX-tiny-sat" / "transformer"


@pytest.fixture(scope="module")
def build():
    """Makes the bundled transformer on the meta device."""
    config = OmegaConf.load(CONFIG)
    node = OmegaConf.to_container(config.model.network_config)
    return lambda: build_on_meta(node)


@pytest.fixture(scope="module")
def loras(build, tmp_path_factory):
    """Two LoRAs of the bundled model; the second changes the first block only."""
    folder, network = tmp_path_factory.mktemp("loras"), build()
    weights = dict(network.named_parameters())
    paths = []
    for number, blocks in enumerate((range(len(network.transformer.layers)), [0])):
        generator = torch.Generator().manual_seed(number)
        shapes = expected_matrices(lora_layers(blocks), weights, 4)
        module = {
            MODEL_PREFIX + name: torch.randn(like.shape, generator=generator)
            for name, like in shapes.items()
        }
        record = {"r": 4, "lora_alpha": 1.0, "layer_range": [*blocks], "base": None}
        paths.append(folder / f"{number}.pt")
        torch.save({"module": module, "lora": record}, paths[-1])
    return [str(path) for path in paths]


def replace_loras(network, loras, **place):
    merge_updates(network, read_updates(loras, dict(network.named_parameters())), **place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loras_are_replaced_back_and_forth(build, loras, dtype):
    first, second = (LoraChoice(path, scale) for path, scale in zip(loras, (0.8, -1), strict=True))

    def fresh(*chosen):
        network = build()
        base = load_transformer(network, LOAD, dtype=dtype, device="cpu")
        merge_loras(network, chosen, base=base)
        return network.state_dict()

    network = build()
    base = load_transformer(network, LOAD, dtype=dtype, device="cpu")
    plain = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    seen = [plain]
    for chosen in ([first], [second], [first, second], []):
        base_weights = read_transformer(LOAD).base
        place = {"base_weights": base_weights, "base": base, "device": "cpu"}
        replace_loras(network, chosen, **place)
        found, expected = network.state_dict(), fresh(*chosen)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        seen.append({name: tensor.clone() for name, tensor in found.items()})
    for one, other in itertools.pairwise(seen):
        assert not all(torch.equal(one[name], tensor) for name, tensor in other.items())
    assert all(torch.equal(seen[-1][name], tensor) for name, tensor in plain.items())


def test_a_wrong_lora_changes_nothing(build, loras, tmp_path):
    network = build()
    base = load_transformer(network, LOAD, dtype=torch.float32, device="cpu")
    place = {"base_weights": read_transformer(LOAD).base, "base": base, "device": "cpu"}
    replace_loras(network, [LoraChoice(loras[1])], **place)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.save({"module": {"a.matrix_A.0": torch.ones(1)}}, tmp_path / "wrong.pt")
    with pytest.raises(UserError):
        replace_loras(
            network, [LoraChoice(loras[0]), LoraChoice(str(tmp_path / "wrong.pt"))], **place
        )
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    replace_loras(network, [], **place)
    assert not all(torch.equal(network.state_dict()[n], tensor) for n, tensor in before.items())


def test_an_engine_maps_its_base_weights_again(tmp_path):
    load = shutil.copytree(LOAD, tmp_path / "transformer")
    model = OmegaConf.to_container(OmegaConf.load(CONFIG).model)
    extra = {"load": str(load), "cached_input": True}
    params = check_params(SATVideoDiffusionEngine, model | extra, where="model")
    engine = SATVideoDiffusionEngine(**params)
    expected = read_transformer(LOAD).base
    found = engine.base_weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (file,) = load.glob("*/*.pt")
    state = torch.load(file, weights_only=True)
    state["module"] = {name: tensor + 1 for name, tensor in state["module"].items()}
    torch.save(state, file)
    with pytest.raises(UserError, match="changed after its weights were loaded"):
        _ = engine.base_weights
