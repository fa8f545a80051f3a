"""LoRA files: what a run saves, what merging does to the weights, what is refused."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from sgm.checkpoint.lora import load_lora, lora_record, merged_tensors, read_lora
from sgm.checkpoint.tensors import LazyTensors
from sgm.checkpoint.transformer import MODEL_PREFIX, fingerprint, is_lora_matrix, load_transformer
from sgm.config import LoraChoice
from sgm.engine import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.util import check_params, instantiate_from_config
from tests.lora_models import merge_loras

LORA = {"target": "sat.model.finetune.lora2.LoraMixin"}


@pytest.fixture
def build(small_model):
    """Makes the small transformer, with LoRA if its params are given, and random weights.

    The base is the same with and without LoRA.
    """

    def make(lora=None, **sizes):
        node = copy.deepcopy(small_model["network_config"])
        node["params"] |= sizes
        node["params"]["modules"]["lora_config"] = lora and LORA | {"params": lora}
        network = instantiate_from_config(node).eval()
        generator = torch.Generator().manual_seed(0)
        weights = {n.replace(".original.", "."): w for n, w in network.named_parameters()}
        with torch.no_grad():
            for name in sorted(weights, key=lambda name: (".matrix_" in name, name)):
                std = 0.5 if ".matrix_" in name else 0.1
                weights[name].normal_(std=std, generator=generator)
        return network

    return make


def predict(network):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return network(
            torch.randn(2, 3, 4, 4, 6, generator=generator),
            torch.tensor([999, 3]),
            context=torch.randn(2, 8, 64, generator=generator),
        )


def merge_lora(network, path, base=None, scale=1.0):
    merge_loras(network, [LoraChoice(str(path), scale)], base=base)


def save(network, path, base=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    matrices = {MODEL_PREFIX + n: w for n, w in network.named_parameters() if is_lora_matrix(n)}
    torch.save({"module": matrices, "lora": lora_record(network, base)}, path)
    return path


def test_a_merged_lora_predicts_what_its_layers_did(build, tmp_path):
    trained = build({"r": 2, "lora_alpha": 3})
    path = save(trained, tmp_path / "lora.pt")
    network = build()
    base = predict(network)
    merge_lora(network, path)
    # Measured 1e-7 on values up to 0.4; the products are summed in another order.
    torch.testing.assert_close(predict(network), predict(trained), rtol=0, atol=2e-6)
    assert (predict(network) - base).abs().max() > 0.1


def test_the_scale_is_the_share_of_the_update(build, tmp_path):
    name = "transformer.layers.1.attention.query_key_value.weight"
    path = save(build({"r": 2, "lora_alpha": 3}), tmp_path / "lora.pt")
    weights = []
    for scale in (0.0, 0.5, 1.0):
        network = build()
        merge_lora(network, path, scale=scale)
        weights.append(network.get_parameter(name))
    assert torch.equal(weights[0], build().get_parameter(name))
    torch.testing.assert_close(weights[1] - weights[0], (weights[2] - weights[0]) / 2)


@pytest.fixture
def two(build, tmp_path):
    """Two LoRAs of different ranks and blocks, with their strengths."""
    one = save(build({"r": 2, "lora_alpha": 3}), tmp_path / "one.pt")
    other = save(build({"r": 5, "lora_alpha": 4, "layer_range": [1]}), tmp_path / "other.pt")
    return [LoraChoice(str(one), 0.7), LoraChoice(str(other), -0.3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_are_summed_in_float32_and_rounded_once(build, two, dtype):
    network = build().to(dtype)
    merge_loras(network, two)
    layer = "transformer.layers.1.attention.query_key_value"
    expected = build().to(dtype).get_parameter(f"{layer}.weight").detach().double()
    for choice, factor in zip(two, (0.7 * 3 / 2, -0.3 * 4 / 5), strict=True):
        matrices, _ = read_lora(choice.path)
        for i in range(3):  # q, k, v
            up, down = (matrices[f"{layer}.matrix_{kind}.{i}"].double() for kind in "BA")
            expected[64 * i : 64 * (i + 1)] += factor * up @ down
    found = network.get_parameter(f"{layer}.weight")
    assert found.dtype == dtype
    # Float32: rounding of a few sums. Bfloat16: half of its step of 2**-7, once.
    limit = 1e-6 if dtype == torch.float32 else 2**-8 * 1.001
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_tensors_are_what_the_network_gets(build, two, dtype):
    network = build().to(dtype)
    base = {name: weight.clone() for name, weight in network.state_dict().items()}
    asked = []
    lazy = LazyTensors(
        {name: lambda name=name: asked.append(name) or base[name] for name in base},
        meta={name: tensor.to("meta") for name, tensor in base.items()},
    )
    merged = merged_tensors(lazy, two, where="base")
    # Before anything is asked for, vectors only, for the fingerprint.
    assert all(base[name].ndim == 1 for name in asked)
    merge_loras(network, two)
    assert merged.keys() == base.keys()
    for name, weight in network.state_dict().items():
        assert merged[name].equal(weight), name
    bias = "transformer.layers.0.attention.dense.bias"
    assert merged[bias] is base[bias]


def test_merged_tensors_of_another_precision_are_rounded_once(build, two):
    base = build().half().state_dict()
    exact = merged_tensors({n: w.float() for n, w in base.items()}, two, where="base")
    merged = merged_tensors(base, two, where="base", dtype=torch.bfloat16)
    twice = 0
    for name, weight in exact.items():
        assert merged[name].equal(weight.bfloat16()), name
        twice += int((weight.half().bfloat16() != weight.bfloat16()).sum())
    assert twice  # so the above does tell
    strong = [LoraChoice(choice.path, 1e8) for choice in two]
    with pytest.raises(UserError, match="base: .* beyond the range of float16"):
        dict(merged_tensors(base, strong, where="base", dtype=torch.float16))
    with pytest.raises(UserError, match="base: .* beyond the range of float16"):
        dict(merged_tensors(base, strong, where="base"))  # whose own precision it is


def test_nothing_is_merged_if_one_of_several_is_wrong(build, two, tmp_path):
    network = build()
    wide = save(build({"r": 2}, hidden_size=96), tmp_path / "wide.pt")
    with pytest.raises(UserError, match="wide.pt does not fit"):
        merge_loras(network, [*two, LoraChoice(str(wide))])
    assert torch.equal(predict(network), predict(build()))
    with pytest.raises(
        UserError, match="fit some/base: .* name the base model that the LoRA was trained"
    ):
        merged_tensors(network.state_dict(), [LoraChoice(str(wide))], where="some/base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_lora_changes_no_bit(build, tmp_path, dtype):
    trained = build({"r": 2})
    network = build().to(dtype)
    network.transformer.layers[0].attention.dense.weight.data[0] = -0.0
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    for name, weight in trained.named_parameters():
        if ".matrix_B." in name:
            weight.data.zero_()
    merge_lora(network, save(trained, tmp_path / "lora.pt"))
    merge_lora(network, save(build({"r": 2}), tmp_path / "strong.pt"), scale=0)
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    for name, weight in network.state_dict().items():
        assert weight.dtype == dtype and torch.equal(weight.view(bits), before[name].view(bits))


def test_half_precision_is_rounded_once(build, tmp_path):
    path = save(build({"r": 2}), tmp_path / "lora.pt")
    half, single = build().bfloat16(), build().bfloat16().float()
    merge_lora(half, path)
    merge_lora(single, path)
    for name, weight in half.named_parameters():
        assert torch.equal(weight, single.get_parameter(name).bfloat16()), name


def test_only_the_layers_in_range_are_saved_and_changed(build, tmp_path):
    path = save(build({"r": 2, "layer_range": [1]}), tmp_path / "lora.pt")
    network, before = build(), build()
    merge_lora(network, path)
    changed = {n for n, w in network.named_parameters() if not w.equal(before.get_parameter(n))}
    attention = "transformer.layers.1.attention"
    assert changed == {f"{attention}.dense.weight", f"{attention}.query_key_value.weight"}
    assert read_lora(path)[1].layer_range == [1]


def test_matrices_and_record_come_back(build, tmp_path):
    network = build({"r": 2, "lora_alpha": 3})
    matrices, record = read_lora(save(network, tmp_path / "lora.pt", "abc"))
    assert vars(record) == lora_record(network, "abc")
    assert vars(record) == {"r": 2, "lora_alpha": 3.0, "layer_range": [0, 1], "base": "abc"}
    assert len(matrices) == 16
    assert all(matrix.equal(network.get_parameter(name)) for name, matrix in matrices.items())


@pytest.mark.parametrize("place", [".", "20", "10-ema", "20/mp_rank_00_model_states.pt"])
def test_a_run_a_checkpoint_an_average_and_a_file_are_read(build, tmp_path, place):
    save(build({"r": 2}), tmp_path / "20" / "mp_rank_00_model_states.pt")
    save(build({"r": 2}), tmp_path / "10-ema" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("20")
    assert len(read_lora(tmp_path / place)[0]) == 16


@pytest.mark.parametrize("form", ["whole.pt", "matrices.safetensors"])
def test_a_file_without_record_is_merged_with_alpha_1_and_says_so(build, tmp_path, caplog, form):
    trained = build({"r": 2, "lora_alpha": 1})
    whole = tmp_path / "whole.pt"  # base and matrices, as older runs saved
    torch.save({"module": {MODEL_PREFIX + n: w for n, w in trained.state_dict().items()}}, whole)
    save_file(read_lora(whole)[0], tmp_path / "matrices.safetensors")
    caplog.clear()
    network = build()
    merge_lora(network, tmp_path / form)
    torch.testing.assert_close(predict(network), predict(trained), rtol=0, atol=2e-6)
    (message,) = caplog.messages
    assert "does not store its lora_alpha; 1 is used" in message


def test_fingerprints_tell_models_apart_but_not_their_copies(build):
    network = build()
    state = network.state_dict()
    known = fingerprint(state)
    assert known == fingerprint({name: tensor.half() for name, tensor in state.items()})
    prefixed = {MODEL_PREFIX + name: tensor for name, tensor in state.items()}
    assert known == fingerprint(prefixed | {"conditioner.bias": torch.ones(3)})
    assert known == fingerprint(build({"r": 2}).state_dict())


@pytest.mark.parametrize("name", ["time_embed.0.bias", "transformer.layers.1.attention.dense.bias"])
def test_a_small_change_changes_the_fingerprint(build, name):
    state = build().state_dict()
    assert fingerprint(state) != fingerprint(state | {name: state[name] * 1.01})


def test_another_base_gives_a_warning(build, tmp_path, caplog):
    network = build()
    base = fingerprint(network.state_dict())
    merge_lora(network, save(build({"r": 2}), tmp_path / "lora.pt", base))
    # The weights are rounded to bfloat16, so the caller gives the fingerprint from before.
    merge_lora(build().bfloat16(), tmp_path / "lora.pt", base=base)
    assert not caplog.messages
    network.time_embed[0].bias.data += 1
    merge_lora(network, tmp_path / "lora.pt")
    assert "was trained on other weights than these" in caplog.text


def edit_of(kind, state, build):
    """Spoil a LoRA's file in one way."""
    matrices = state["module"]
    first = next(iter(matrices))
    if kind == "no matrices":
        state["module"] = {MODEL_PREFIX + "mixins.a": matrices[first]}
    elif kind == "other format":
        state["module"] = {"unet.lora_A.weight": matrices[first]}
    elif kind == "a matrix less":
        del matrices[first]
    elif kind == "whole model":
        state["module"] = {MODEL_PREFIX + n: w for n, w in build().state_dict().items()}
    elif kind == "no tensors":
        state["module"] = {}
    elif kind == "sparse":
        matrices[first] = matrices[first].to_sparse()
    elif kind == "without content":
        matrices[first] = matrices[first].to("meta")
    elif kind == "empty matrices":
        state["module"] = {name: matrix[:0, :0] for name, matrix in matrices.items()}
    else:
        state["lora"] |= kind


SPOILT = [
    ("whole model", "is a whole model, not a LoRA; it must be a LoRA"),
    ("no matrices", "holds no LoRA in SAT format"),
    ("other format", "do not fit .*unet.lora_A.weight.*CogVideoX-2B"),
    ("no tensors", "holds no tensors"),
    (
        "a matrix less",
        r"1 missing \(transformer.layers.0.attention.*name the base model that the LoRA",
    ),
    ("empty matrices", "r=2; download or copy it"),
    ("sparse", "matrix_A.0' is not a dense tensor"),
    ("without content", "matrix_A.0' is not a dense tensor"),
    ({"r": torch.ones(3)}, r"r=tensor\(.*; download or copy it"),
    ({"r": 3}, "r=3; download or copy it"),
    ({"lora_alpha": float("nan")}, "lora_alpha=nan; download or copy it"),
    ({"lora_alpha": 10**400}, "lora_alpha=1000"),
    ({"lora_alpha": "1"}, "lora_alpha='1'"),
    ({"layer_range": "01"}, "layer_range='01'"),
    ({"layer_range": [0]}, "8 unknown"),
    ({"base": 3}, "base=3"),
]


@pytest.mark.parametrize(("kind", "words"), SPOILT)
def test_what_is_no_whole_lora_is_one_sentence(build, tmp_path, kind, words):
    path = save(build({"r": 2}), tmp_path / "lora.pt")
    state = torch.load(path)
    edit_of(kind, state, build)
    torch.save(state, path)
    with pytest.raises(UserError, match=words) as failure:
        merge_lora(build(), path)
    assert str(path) in str(failure.value) and "\n" not in str(failure.value)


def test_a_lora_of_another_model_is_one_sentence_and_changes_nothing(build, tmp_path):
    path = save(build({"r": 2}), tmp_path / "lora.pt")
    wide, shallow = build(hidden_size=96), build(num_layers=1)
    with pytest.raises(UserError, match=r"is \[2, \d+\] in the file, \[2, 96\] in the model"):
        merge_lora(wide, path)
    with pytest.raises(UserError, match=r"8 unknown \(transformer.layers.1.*base model"):
        merge_lora(shallow, path)
    assert torch.equal(predict(shallow), predict(build(num_layers=1)))


def test_a_missing_lora_names_its_argument(tmp_path):
    with pytest.raises(UserError, match="^lora: .*absent does not exist; .* diffusers or peft"):
        read_lora(tmp_path / "absent")


def test_a_lora_is_trained_on_from_its_file(build, tmp_path):
    trained = build({"r": 2, "lora_alpha": 3})
    path = save(trained, tmp_path / "lora.pt")
    network = build({"r": 2, "lora_alpha": 3})
    for name, weight in network.named_parameters():
        if ".matrix_" in name:
            weight.data.zero_()
    load_lora(network, path)
    assert torch.equal(predict(network), predict(trained))


@pytest.mark.parametrize(
    ("configured", "words"),
    [
        (None, "has no lora_config"),
        ({"r": 4, "lora_alpha": 3}, "with r=2, but lora_config says 4; set r: 2 there"),
        ({"r": 2}, "lora_alpha=3, but lora_config says 1; set lora_alpha: 3 there"),
        ({"r": 2, "lora_alpha": 3, "layer_range": [0]}, "8 unknown"),
    ],
)
def test_training_on_needs_the_same_lora_config(build, tmp_path, configured, words):
    path = save(build({"r": 2, "lora_alpha": 3}), tmp_path / "lora.pt")
    with pytest.raises(UserError, match=words):
        load_lora(build(configured), path)


def test_a_lora_in_the_place_of_a_model_is_told_where_it_belongs(build, tmp_path):
    path = save(build({"r": 2}), tmp_path / "lora.pt")
    with pytest.raises(UserError, match="is a LoRA, not a whole model; load must name its base"):
        load_transformer(build(), path, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("place", ["nowhere", "under model", "in modules"])
def test_the_engine_merges_and_adds_no_layers_of_its_own(build, small_model, tmp_path, place):
    trained = build({"r": 2, "lora_alpha": 3})
    base = build()
    torch.save(
        {"module": {MODEL_PREFIX + n: w for n, w in base.state_dict().items()}},
        tmp_path / "base.pt",
    )
    own = {"nowhere": {}, "under model": {"lora_config": LORA | {"params": {"r": 7}}}}.get(
        place, {}
    )
    if place != "in modules":
        small_model["network_config"]["params"]["modules"].pop("lora_config", None)
    model = small_model | own | {"load": str(tmp_path / "base.pt"), "not_trainable_prefixes": []}
    model["lora"] = [LoraChoice(str(save(trained, tmp_path / "lora.pt")))]
    engine = SATVideoDiffusionEngine(**check_params(SATVideoDiffusionEngine, model, where="model"))
    network = engine.model.diffusion_model.eval()
    assert not any(".matrix_" in name for name, _ in network.named_parameters())
    torch.testing.assert_close(predict(network), predict(trained), rtol=0, atol=2e-6)
    assert engine.base_fingerprint == fingerprint(base.state_dict())
