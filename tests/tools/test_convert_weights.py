"""SAT's weights to diffusers and back: what diffusers loads, what comes back, what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from arguments import parse_config
from sgm.checkpoint.find import find_t5
from sgm.checkpoint.reading import read_checkpoint
from sgm.checkpoint.transformer import MODEL_PREFIX, POSITION_TABLE
from sgm.config import SamplingArgs, TrainingArgs
from sgm.modules.encoders.modules import T5Tokenizer
from sgm.training.run_folder import save_config
from sgm.util import instantiate_from_config
from tests.conftest import OLD_NAMES
from tests.small_weights import CHECKPOINT, Small, files_below, hf2sat, nothing_new, refused, sat2hf
from tools import convert_weight_sat2hf
from tools.weights import sources
from tools.weights.writing import save_sat_transformer

ROOT = Path(__file__).parents[2]
TINY = ROOT / "CogVideoX-tiny-sat"
TINY_CONFIG = ROOT / "configs" / "cogvideox_tiny_infer.yaml"


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return Small(tmp_path / "small")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in diffusers' layout, converted in another folder than the repository."""
    folder = tmp_path_factory.mktemp("elsewhere")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert sat2hf("--base", TINY_CONFIG, "--output_path", "tiny") == 0
    finally:
        os.chdir(before)
    return folder / "tiny"


def test_the_bundled_model_loads_in_diffusers_with_the_same_numbers(bundled):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.CogVideoXPipeline.from_pretrained(bundled, local_files_only=True)
    assert all(pipe.components.values())
    config = parse_config(SamplingArgs, "", ["--base", str(TINY_CONFIG)]).model
    state = read_checkpoint(TINY / "transformer/3078/mp_rank_00_model_states.pt")["module"]
    network = instantiate_from_config(config["network_config"])
    own = {name.removeprefix(MODEL_PREFIX): tensor.float() for name, tensor in state.items()}
    network.load_state_dict(own | {POSITION_TABLE: network.state_dict()[POSITION_TABLE]})

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, 12, generator=generator)
    context = torch.randn(2, 32, 128, generator=generator)
    timesteps = torch.tensor([3, 870])
    with torch.no_grad():
        ours = network.eval()(x, timesteps=timesteps, context=context)
        theirs = pipe.transformer.float()(x, context, timesteps).sample
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # order of sums in float32

    shape = {**config["first_stage_config"]}
    shape["params"] = {**shape["params"], "ckpt_path": str(TINY / "vae" / "3d-vae.pt")}
    vae = instantiate_from_config(shape).eval()
    z = torch.randn(1, 8, 5, 4, 6, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(z), pipe.vae.decode(z).sample, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("part", "class_name"),
    [("transformer", "CogVideoXTransformer3DModel"), ("vae", "AutoencoderKLCogVideoX")],
)
def test_every_key_of_the_configurations_is_diffusers_and_has_its_value(bundled, part, class_name):
    kind = getattr(pytest.importorskip("diffusers"), class_name)
    model, found = kind.from_pretrained(bundled / part, output_loading_info=True)
    assert not any(found.values())
    written = json.loads((bundled / part / "config.json").read_text())
    saved = json.loads(model.to_json_string())
    written.pop("_diffusers_version")
    assert all(saved[key] == value for key, value in written.items())


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("VPSDEDPMPP2MSampler", "CogVideoXDPMScheduler"),
        ("VideoDDIMSampler", "CogVideoXDDIMScheduler"),
    ],
)
def test_the_scheduler_is_the_samplers(small, target, name):
    diffusers = pytest.importorskip("diffusers")
    sampler = small.model["sampler_config"]
    sampler["target"] = f"sgm.modules.diffusionmodules.sampling.{target}"
    sampler["params"]["discretization_config"]["params"]["shift_scale"] = 2.5
    small.write_config()
    assert small.convert(output=name, vae_ckpt_path=None) == 0
    folder = small.folder / name
    assert json.loads((folder / "model_index.json").read_text())["scheduler"][1] == name
    written = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, name).from_pretrained(folder / "scheduler")
    saved = json.loads(scheduler.to_json_string())
    assert saved.keys() == written.keys() and saved["snr_shift_scale"] == 2.5
    assert all(saved[key] == written[key] for key in written if key != "_diffusers_version")


def test_numbers_of_the_options_win_over_the_configuration(small):
    options = ["--scaling_factor", 0.7, "--snr-shift-scale", 1.5]
    assert small.convert(*options, transformer_ckpt_path=None) == 0
    out = small.folder / "out"
    assert json.loads((out / "vae" / "config.json").read_text())["scaling_factor"] == 0.7
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["snr_shift_scale"] == 1.5


@pytest.mark.parametrize("text", [
    "a red circle moving right on a black background", "", "  two   spaces, and\ta tab ",
    "a small blue square moving up slowly on a white background " * 3,
])  # fmt: skip
def test_token_ids_are_ours(bundled, text):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5Tokenizer.from_pretrained(bundled / "tokenizer", local_files_only=True)
    assert theirs.model_max_length == 32
    vocabulary = json.loads((TINY / "t5" / "config.json").read_text())["vocab_size"]
    assert len(theirs) <= vocabulary  # each token that it knows has an embedding
    ids = theirs(
        [text], padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    ).input_ids
    ours = T5Tokenizer(TINY / "t5" / "spiece.model", max_length=32)
    assert torch.equal(ids, ours([text]))


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, {}),
        (torch.float16, {"num_layers": 3, "hidden_size": 96}),
        (torch.bfloat16, {"num_layers": 1, "num_attention_heads": 4}),
    ],
)
def test_there_and_back_is_the_same_to_the_bit(tmp_path, dtype, sizes):
    small = Small(tmp_path / "small", dtype=dtype, **sizes)
    assert small.convert() == 0
    assert hf2sat(small.folder / "out", tmp_path / "back") == 0
    found = read_checkpoint(tmp_path / "back" / "transformer" / CHECKPOINT)["module"]
    assert found.keys() == {MODEL_PREFIX + name for name in small.base}
    for name, tensor in small.base.items():
        assert found[MODEL_PREFIX + name].dtype is dtype
        assert torch.equal(found[MODEL_PREFIX + name], tensor)
    vae = read_checkpoint(tmp_path / "back" / "vae" / "3d-vae.pt")["state_dict"]
    assert vae.keys() == small.vae_state.keys()
    assert all(torch.equal(vae[name], tensor) for name, tensor in small.vae_state.items())


def test_precision_is_the_transformers_alone(small, tmp_path):
    assert small.convert("--bf16") == 0
    out = small.folder / "out"
    stem = "diffusion_pytorch_model.safetensors"
    kinds = [
        {t.dtype for t in load_file(out / part / stem).values()} for part in ("transformer", "vae")
    ]
    assert kinds == [{torch.bfloat16}, {torch.float32}]
    assert hf2sat(out, tmp_path / "back", "--fp16") == 0
    found = read_checkpoint(tmp_path / "back" / "transformer" / CHECKPOINT)["module"]
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}


def test_only_what_is_given_is_written(small, capsys):
    assert small.convert(vae_ckpt_path=None) == 0
    out = small.folder / "out"
    assert files_below(out) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    index = json.loads((out / "model_index.json").read_text())
    assert index["vae"] == index["tokenizer"] == index["text_encoder"] == [None, None]
    said = capsys.readouterr().out
    assert "vae=None, text_encoder=None, tokenizer=None)" in said
    diffusers = pytest.importorskip("diffusers")
    absent = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipe = diffusers.CogVideoXPipeline.from_pretrained(out, **absent)
    assert pipe.transformer is not None and pipe.vae is None


def test_a_checkpoint_of_the_whole_engine_gives_its_autoencoder(small):
    path = small.transformer / CHECKPOINT
    state = {MODEL_PREFIX + name: tensor for name, tensor in small.base.items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in small.vae_state.items()}
    torch.save({"module": state | {"conditioner.embedders.0.x": torch.ones(1)}}, path)
    assert small.convert(vae_ckpt_path=None) == 0
    found = load_file(small.folder / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    name = "encoder.conv_in.conv.weight"
    assert torch.equal(found[name], small.vae_state[name])
    assert files_below(small.folder / "out").count("transformer/config.json") == 1


def test_a_run_is_converted_by_its_own_configuration(small, tmp_path):
    run = tmp_path / "run"
    save_sat_transformer(run, small.base, tag="5-ema")
    config = parse_config(TrainingArgs, "", ["--base", str(small.config)])
    save_config(config, run)
    assert small.convert(base=None, transformer_ckpt_path=run / "5-ema", vae_ckpt_path=None) == 0
    written = json.loads((small.folder / "out" / "transformer" / "config.json").read_text())
    assert (written["sample_width"], written["max_text_seq_length"]) == (6, 8)


def add_matrices(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """LoRA matrices of rank 1 for the layers of `state`: A all ones, B all a half."""
    matrices = {}
    for name, weight in state.items():
        for layer, pairs in (("query_key_value.weight", 3), ("attention.dense.weight", 1)):
            if name.endswith(layer):
                rows, columns = weight.shape
                stem = prefix + name.removesuffix(".weight")
                for i in range(pairs):
                    matrices[f"{stem}.matrix_A.{i}"] = torch.ones(1, columns)
                    matrices[f"{stem}.matrix_B.{i}"] = torch.full((rows // pairs, 1), 0.5)
    return matrices


def test_loras_are_merged_on_request_and_never_dropped(small, tmp_path, capsys):
    both = {MODEL_PREFIX + name: tensor for name, tensor in small.base.items()}
    both |= add_matrices(small.base, MODEL_PREFIX)
    torch.save({"module": both}, small.transformer / CHECKPOINT)
    refused(capsys, small.convert(), "LoRA matrices besides the base", "--lora")
    nothing_new(small.folder, "small.yaml", "transformer", "vae.pt")

    assert small.convert("--lora", f"{small.transformer}:2", vae_ckpt_path=None) == 0
    found = load_file(small.folder / "out/transformer/diffusion_pytorch_model.safetensors")
    weight = small.base["transformer.layers.0.attention.dense.weight"]
    expected = (weight.float() + 2 * 0.5).half()  # scale · alpha / r · B A with alpha 1
    assert torch.equal(found["transformer_blocks.0.attn1.to_out.0.weight"], expected)

    options = ["--lora", f"{small.transformer}:0.3", "--bf16"]
    assert small.convert(*options, vae_ckpt_path=None, output="in_bf16") == 0
    found = load_file(small.folder / "in_bf16/transformer/diffusion_pytorch_model.safetensors")
    total = weight.float() + 0.3 * 0.5
    assert torch.equal(found["transformer_blocks.0.attn1.to_out.0.weight"], total.bfloat16())
    assert not torch.equal(total.half().bfloat16(), total.bfloat16())  # so rounding twice shows

    lora = tmp_path / "lora"
    save_sat_transformer(lora, add_matrices(small.base, ""), lora={"r": 1, "lora_alpha": 1.0})
    refused(capsys, small.convert(transformer_ckpt_path=lora, output="o"), "is a LoRA", "--lora")
    refused(
        capsys,
        small.convert("--lora", lora, transformer_ckpt_path=None, output="o"),
        "--transformer_ckpt_path",
    )


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin", "sharded bin"])
def test_the_text_encoder_comes_along_in_any_form(small, t5_folder, tmp_path, form):
    transformers = pytest.importorskip("transformers")
    t5 = tmp_path / "t5"
    shutil.copytree(t5_folder, t5)
    (t5 / "tf_model.h5").write_bytes(b"not needed")
    weights = load_file(t5 / "model.safetensors")
    if form != "safetensors":
        (t5 / "model.safetensors").unlink()
    names = sorted(weights)
    kind, save = ("bin", torch.save) if "bin" in form else ("safetensors", save_file)
    stem = "pytorch_model" if kind == "bin" else "model"
    if "sharded" in form:
        shards = {f"{stem}-0000{i}-of-00002.{kind}": names[i - 1 :: 2] for i in (1, 2)}
        for file, held in shards.items():
            save({name: weights[name] for name in held}, t5 / file)
        index = {"metadata": {}, "weight_map": {n: f for f, held in shards.items() for n in held}}
        (t5 / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    elif form == "bin":
        torch.save(weights, t5 / "pytorch_model.bin")

    link = ["--link_text_encoder"] if form == "sharded" else []
    assert small.convert("--text_encoder_path", t5, *link, vae_ckpt_path=None) == 0
    out = small.folder / "out"
    assert "tf_model.h5" not in os.listdir(out / "text_encoder")
    assert all(p.is_symlink() == bool(link) for p in (out / "text_encoder").iterdir())
    expected = transformers.T5EncoderModel.from_pretrained(t5_folder).state_dict()
    found = transformers.T5EncoderModel.from_pretrained(out / "text_encoder").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    assert hf2sat(out, tmp_path / "back", *link) == 0
    assert (tmp_path / "back" / "t5-v1_1-xxl" / "spiece.model").is_file()
    found = transformers.T5EncoderModel.from_pretrained(tmp_path / "back" / "t5-v1_1-xxl")
    assert torch.equal(found.shared.weight, expected["shared.weight"])


def test_a_tokenizer_of_newer_transformers_is_carried_both_ways(bundled, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "pipeline"
    shutil.copytree(bundled, folder)
    tokenizer = transformers.T5Tokenizer.from_pretrained(bundled / "tokenizer")
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    assert not (folder / "tokenizer" / "spiece.model").exists()

    assert hf2sat(folder, tmp_path / "sat") == 0
    t5 = tmp_path / "sat" / "t5-v1_1-xxl"
    assert (t5 / "tokenizer.json").is_file() and not (t5 / "spiece.model").exists()
    text = ["a red circle moving right on a black background"]
    expected = T5Tokenizer(TINY / "t5" / "spiece.model", max_length=32)(text)
    assert torch.equal(T5Tokenizer(find_t5(t5).tokenizer, max_length=32)(text), expected)

    again = tmp_path / "again"
    words = ["--text_encoder_path", t5, "--base", TINY_CONFIG, "--output_path", again]
    assert sat2hf(*words) == 0
    theirs = transformers.T5Tokenizer.from_pretrained(again / "tokenizer", local_files_only=True)
    ids = theirs(text, padding="max_length", max_length=32, return_tensors="pt").input_ids
    assert torch.equal(ids, expected)


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("small/out/transformer", [f"transformer/{CHECKPOINT}", "transformer/latest"]),
        ("small/out/vae", ["vae/3d-vae.pt"]),
        ("snapshot", ["vae/3d-vae.pt"]),
    ],
)
def test_one_part_alone_comes_back_and_a_snapshot_of_links_does(small, tmp_path, source, files):
    assert small.convert() == 0
    out, snapshot = small.folder / "out", tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "vae").mkdir()
    for path in (out / "vae").iterdir():
        (snapshot / "vae" / path.name).symlink_to(path)
    (snapshot / "model_index.json").symlink_to(out / "model_index.json")
    assert hf2sat(tmp_path / source, tmp_path / "target") == 0
    assert files_below(tmp_path / "target") == files


def test_without_options_the_bundled_model_is_converted_and_it_says_why(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert_weight_sat2hf, "set_up_logging", lambda: None)
    monkeypatch.setattr(sources, "FULL", str(full_without_weights(tmp_path)))
    caplog.set_level(logging.INFO)
    assert sat2hf() == 0
    assert "nowhere/transformer" in caplog.text and "converting the bundled model" in caplog.text
    assert (tmp_path / "CogVideoX-tiny-diffusers" / "text_encoder" / "config.json").is_file()


def test_the_closing_line_has_the_length_of_a_text(small, capsys):
    assert small.convert() == 0
    assert capsys.readouterr().out.endswith("pass max_sequence_length=8 to each call\n")
    position = small.model["network_config"]["params"]["modules"]["pos_embed_config"]["params"]
    position["text_length"] = 226  # diffusers' own
    small.write_config()
    assert small.convert(output="usual", transformer_ckpt_path=None) == 0
    assert "max_sequence_length" not in capsys.readouterr().out


def test_a_transformer_of_diffusers_is_written_anew(small):
    assert small.convert() == 0
    folder = small.folder / "out" / "transformer"
    assert small.convert(transformer_ckpt_path=folder, vae_ckpt_path=None, output="again") == 0
    name = "diffusion_pytorch_model.safetensors"
    before, after = load_file(folder / name), load_file(small.folder / "again/transformer" / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def full_without_weights(folder: Path) -> Path:
    sections = yaml.safe_load(OLD_NAMES.read_text())
    sections["args"]["load"] = "nowhere/transformer"
    (folder / "full.yaml").write_text(yaml.safe_dump(sections))
    return folder / "full.yaml"
