"""Random weights that are written tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import T5EncoderModel

from sgm.errors import UserError
from sgm.modules.encoders.modules import FrozenT5Embedder
from tools.bench.measuring import randomize
from tools.make_random_weights import main, random_tensor, write_t5

TINY = str(Path(__file__).parents[2] / "configs" / "cogvideox_tiny_infer.yaml")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_text_encoder_is_whole_for_us_and_for_transformers(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    write_t5(tmp_path / "t5", width=64, num_layers=2, dtype=dtype)
    tensors = load_file(tmp_path / "t5" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert tensors["shared.weight"].shape == (32128, 64)
    assert tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"].shape == (64, 160)
    assert tensors["shared.weight"].float().std().item() == pytest.approx(0.02, rel=0.01)
    embedder = FrozenT5Embedder(str(tmp_path / "t5"), max_length=8)
    theirs, report = T5EncoderModel.from_pretrained(
        tmp_path / "t5", dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = embedder.tokenizer(["a red circle"])
    with torch.no_grad():
        embedding = embedder(["a red circle"])
        assert embedding.isfinite().all()
        torch.testing.assert_close(theirs.eval()(ids).last_hidden_state, embedding)


@pytest.mark.parametrize("name", ["a.weight", "norm.weight", "a.bias"])
@pytest.mark.parametrize("shape", [(3,), (30, 40)])
def test_files_and_modules_get_values_of_one_kind(name: str, shape: tuple[int, ...]) -> None:
    module = torch.nn.Module()
    for part in name.split(".")[:-1]:
        module.add_module(part, torch.nn.Module())
    leaf = module.get_submodule(name.rpartition(".")[0])
    leaf.register_parameter(name.rpartition(".")[2], torch.nn.Parameter(torch.empty(shape)))
    torch.manual_seed(0)
    randomize(module)
    torch.manual_seed(0)
    drawn = random_tensor(name, torch.Size(shape), dtype=torch.float32)
    assert torch.equal(drawn, module.get_parameter(name))
    if len(shape) == 1:
        assert drawn.tolist() == [float(name.endswith("weight"))] * 3
    else:
        assert drawn.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.fixture
def overlay(tmp_path: Path) -> dict:
    """A configuration that leads the bundled configuration's weights to a new folder."""
    embedder = yaml.safe_load(Path(TINY).read_text())["model"]["conditioner_config"]["params"]
    embedder["emb_models"][0]["params"]["model_dir"] = str(tmp_path / "made" / "t5")
    return {
        "args": {"load": str(tmp_path / "made" / "transformer")},
        "model": {
            "first_stage_config": {"params": {"ckpt_path": str(tmp_path / "made" / "vae.pt")}},
            "conditioner_config": {"params": embedder},
        },
    }


def run(overlay: dict, tmp_path: Path, *flags: str) -> int:
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    return main(["--base", TINY, str(tmp_path / "overlay.yaml"), *flags])


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("args", "load", "args.load is not set"),
        ("model", "first_stage_config", "model.first_stage_config.params.ckpt_path is not set"),
        ("model", "conditioner_config", "model.conditioner_config has 0 T5 embedders"),
    ],
)
def test_a_configuration_without_a_part(
    overlay: dict, tmp_path: Path, section: str, key: str, message: str
) -> None:
    overlay[section][key] = None
    with pytest.raises(UserError, match=message):
        run(overlay, tmp_path)
    assert not (tmp_path / "made").exists()


def test_mistakes_of_the_user(overlay: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--t5-layers must be at least 1"):
        run(overlay, tmp_path, "--t5-layers", "0")
    with pytest.raises(UserError, match="model.network_config.params is missing"):
        main(["--base", str(tmp_path / "overlay.yaml")])
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "vae.pt").touch()
    with pytest.raises(UserError, match="vae.pt exists already; remove it"):
        run(overlay, tmp_path)


@pytest.mark.parametrize(
    ("stopped", "whole"),
    [
        ("tools.make_random_weights.save_sat_transformer", []),
        ("sgm.files.write_torch", ["transformer"]),  # beneath the autoencoder's `save_torch`
        ("tools.make_random_weights.save_sharded", ["transformer", "vae.pt"]),
    ],
)
def test_nothing_half_is_left(
    overlay: dict, tmp_path: Path, stopped: str, whole: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(overlay, tmp_path, "--t5-layers", "1")
    assert sorted(path.name for path in (tmp_path / "made").glob("*")) == whole
