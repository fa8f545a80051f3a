"""Finding the transformer's file, sorting its keys, and telling real gaps from expected ones."""

import pytest
import torch
from safetensors.torch import save_file

from sgm.checkpoint.find import find_transformer
from sgm.checkpoint.transformer import MODEL_PREFIX, POSITION_TABLE, load_transformer
from sgm.errors import UserError
from sgm.util import instantiate_from_config


def network_config(**lora):
    modules = {
        "pos_embed_config": (
            "position_embedding.Basic3DPositionEmbeddingMixin",
            {"text_length": 5},
        ),
        "patch_embed_config": ("patch_embedding.ImagePatchEmbeddingMixin", {"text_hidden_size": 6}),
        "adaln_layer_config": ("adaln.AdaLNMixin", {}),
        "final_layer_config": ("final_layer.FinalLayerMixin", {}),
    }
    nodes = {
        name: {"target": f"sgm.modules.transformer.{target}", "params": params}
        for name, (target, params) in modules.items()
    }
    if lora:
        nodes["lora_config"] = {"target": "sat.model.finetune.lora2.LoraMixin", "params": lora}
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "in_channels": 4}
    sizes |= {"out_channels": 4, "patch_size": 2, "latent_height": 4, "latent_width": 6}
    sizes |= {"num_frames": 9, "time_compressed_rate": 4, "time_embed_dim": 16, "modules": nodes}
    return {"target": "dit_video_concat.DiffusionTransformer", "params": sizes}


def build(**lora):
    return instantiate_from_config(network_config(**lora))


def build_on_meta(**lora):
    with torch.device("meta"):
        return instantiate_from_config(network_config(**lora))


def randomise(network):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name != POSITION_TABLE:
                weight.normal_(generator=generator)
    return network


def published(network, **extra):
    state = {MODEL_PREFIX + name: tensor.half() for name, tensor in network.state_dict().items()}
    del state[MODEL_PREFIX + POSITION_TABLE]
    return {"module": state | extra}


@pytest.fixture
def saved(tmp_path):
    """A published folder: network, and the path of its file."""
    network = randomise(build())
    (tmp_path / "1000").mkdir()
    path = tmp_path / "1000" / "mp_rank_00_model_states.pt"
    extra = {"conditioner.embedders.0.a": torch.ones(1), "first_stage_model.b": torch.ones(1)}
    torch.save(published(network, **extra), path)
    (tmp_path / "latest").write_text("1000\n")
    return network, path


def load(network, path, dtype=torch.float32):
    load_transformer(network, path, dtype=dtype, device="cpu")
    return network


def test_folder_tag_and_file_lead_to_the_file(saved, tmp_path):
    _, path = saved
    assert find_transformer(tmp_path).path == path
    assert find_transformer(tmp_path / "1000").path == path
    assert find_transformer(path).path == path


def test_published_weights_load_with_the_computed_position_table(saved, tmp_path):
    network, _ = saved
    loaded = load(build_on_meta(), tmp_path)
    table = loaded.state_dict()[POSITION_TABLE]
    assert torch.equal(table, network.state_dict()[POSITION_TABLE])
    for name, tensor in network.state_dict().items():
        if name != POSITION_TABLE:
            assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name


def test_weights_come_in_the_runs_type_and_nothing_stays_on_meta(saved, tmp_path):
    loaded = load(build_on_meta(), tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


def test_a_safetensors_file_without_prefix_loads(tmp_path):
    network = randomise(build())
    save_file(network.state_dict(), tmp_path / "transformer.safetensors")
    loaded = load(build_on_meta(), tmp_path / "transformer.safetensors")
    assert torch.equal(loaded.time_embed[0].weight, network.time_embed[0].weight)


def test_lora_matrices_of_a_training_run_load(tmp_path):
    network = randomise(build(r=3))
    torch.save(published(network), tmp_path / "lora.pt")
    loaded = load(build_on_meta(r=3), tmp_path / "lora.pt")
    expected = network.state_dict()
    for name, tensor in loaded.state_dict().items():
        if name != POSITION_TABLE:
            assert torch.equal(tensor, expected[name].half().float()), name


def test_lora_starts_from_zero_on_plain_weights(saved, tmp_path):
    loaded = load(build_on_meta(r=3), tmp_path)
    layer = loaded.transformer.layers[0].attention.query_key_value
    assert not layer.matrix_B[0].any() and layer.matrix_A[0].any()
    assert torch.equal(
        layer.original.weight,
        saved[0].transformer.layers[0].attention.query_key_value.weight.half(),
    )


def edited(saved, edit):
    _, path = saved
    state = torch.load(path)
    edit(state["module"])
    torch.save(state, path)
    return path


NAME = MODEL_PREFIX + "time_embed.0.weight"
MISTAKES = {
    "a missing key": (lambda m: m.pop(NAME), r"1 missing \(time_embed.0.weight\)"),
    "an unknown key": (lambda m: m.update({MODEL_PREFIX + "x.y": m[NAME]}), r"1 unknown \(x.y\)"),
    "another shape": (
        lambda m: m.update({NAME: torch.ones(2, 2)}),
        r"time_embed.0.weight is \[2, 2\] in the file, \[16, 32\] in the model",
    ),
    "no transformer": (lambda m: [m.pop(k) for k in list(m) if k.startswith("model.")], "no trans"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_weights_of_another_model_are_refused(saved, kind):
    edit, words = MISTAKES[kind]
    path = edited(saved, edit)
    with pytest.raises(UserError, match=words) as failure:
        load(build_on_meta(), path)
    assert str(path) in str(failure.value) and "\n" not in str(failure.value)


def test_lora_of_another_rank_or_without_configuration_is_refused(tmp_path):
    torch.save(published(randomise(build(r=3))), tmp_path / "lora.pt")
    with pytest.raises(UserError, match=r"matrix_A.0 is \[3, 32\] in the file, \[4, 32\]"):
        load(build_on_meta(r=4), tmp_path / "lora.pt")
    with pytest.raises(UserError, match="LoRA matrices of rank 3"):
        load(build_on_meta(), tmp_path / "lora.pt")


@pytest.mark.parametrize("place", ["absent", "empty", "dangling"])
def test_a_missing_file_is_named_with_the_expected_layout(tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "latest").write_text("500")
    with pytest.raises(UserError, match="latest"):
        find_transformer(tmp_path / place)


@pytest.mark.parametrize(
    "tag", ["<!DOCTYPE html><html>quota</html>", "../other", "500\n600", "5" * 5000, "a\0b"]
)
def test_a_latest_that_names_no_folder_is_one_sentence(tmp_path, tag):
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(UserError) as failure:
        find_transformer(tmp_path)
    assert "\n" not in str(failure.value) and "load: " in str(failure.value)
    assert len(str(failure.value)) < 400


@pytest.mark.parametrize("load", ["a" * 5000, "~nobody-of-this-name/weights"])
def test_a_load_that_cannot_be_looked_up_is_one_sentence(load):
    with pytest.raises(UserError, match="load: "):
        find_transformer(load)
