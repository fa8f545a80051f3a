"""LoRAs out to diffusers, in from diffusers and merged, by the three commands."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sgm.checkpoint.find import DIFFUSERS_FILE, MODEL_FILES
from sgm.checkpoint.lora import load_lora, read_lora
from sgm.checkpoint.lora_formats import BASE_KEY, METADATA_KEY
from sgm.checkpoint.transformer import MODEL_PREFIX, fingerprint, read_transformer
from sgm.cli import run_command
from sgm.config import LoraChoice
from tests.conftest import full_disk
from tests.lora_models import (
    build,
    build_theirs,
    merge_loras,
    predict,
    randomize,
    save_base,
    save_run,
)
from tools import export_sat_lora_weight, import_lora, merge_lora

ROOT = Path(__file__).resolve().parents[2]
Q = "transformer.layers.1.attention.query_key_value"
LORA = {"r": 3, "lora_alpha": 5}


@pytest.fixture
def command(capsys):
    """Runs a command as its script does; returns exit code, stdout and what else it said."""

    def run(module, *words):
        code = run_command(partial(module.main, [str(word) for word in words]))
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return run


@pytest.fixture
def export(command, tmp_path):
    def run(path, *words, to="out"):
        folder = tmp_path / to
        words = ["--sat_pt_path", path, "--lora_save_directory", folder, *words]
        return *command(export_sat_lora_weight, *words), folder

    return run


@pytest.fixture
def bring_in(command, tmp_path):
    def run(path, *words, to="in"):
        words = ["--lora_path", path, "--output_path", tmp_path / to, *words]
        return *command(import_lora, *words), tmp_path / to

    return run


@pytest.fixture
def merge(command, tmp_path):
    def run(load, *words, to="merged"):
        words = ["--load", load, "--output_path", tmp_path / to, *words]
        return *command(merge_lora, *words), tmp_path / to

    return run


def pipeline_with(network):
    """diffusers' pipeline around the base weights of `network`, without its other models."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return diffusers.CogVideoXPipeline(
        transformer=build_theirs(network), scheduler=scheduler, **parts
    )


@pytest.mark.parametrize("layer_range", [None, [1]])
def test_diffusers_loads_an_exported_lora_with_its_strength(export, tmp_path, layer_range):
    lora = LORA | ({"layer_range": layer_range} if layer_range else {})
    run = save_run(build(lora), tmp_path / "run", base="0123456789abcdef")
    code, said, _, folder = export(run)
    assert code == 0 and f"pipe.load_lora_weights('{folder}')" in said

    network = build()
    pipe = pipeline_with(network)
    pipe.load_lora_weights(str(folder))
    matrices, _ = read_lora(run)
    to_q = pipe.transformer.transformer_blocks[1].attn1.to_q
    (adapter,) = to_q.scaling
    update = matrices[f"{Q}.matrix_B.0"] @ matrices[f"{Q}.matrix_A.0"] * 5 / 3
    torch.testing.assert_close(to_q.get_delta_weight(adapter), update)
    first = pipe.transformer.transformer_blocks[0].attn1.to_q
    assert hasattr(first, "scaling") == (layer_range is None)

    base = predict(network)
    merge_loras(network, [LoraChoice(str(run))])
    assert (predict(network) - base).abs().max() > 0.05
    # As without LoRA: rounding, and the last norm's epsilon, 1e-6 here and 1e-5 there.
    torch.testing.assert_close(predict(network), predict(pipe.transformer), rtol=0, atol=1e-4)


def test_the_metadata_is_what_diffusers_itself_writes(export, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    *_, folder = export(save_run(build(LORA | {"layer_range": [1]}), tmp_path / "run"))
    with safe_open(folder / DIFFUSERS_FILE, framework="pt") as file:
        written = file.metadata()
    settings = json.loads(written[METADATA_KEY])
    assert settings["transformer.r"] == 3 and settings["transformer.lora_alpha"] == 5
    # In full: "to_q" alone would mean that of block 0 too.
    layers = [f"transformer_blocks.1.attn1.{name}" for name in ("to_k", "to_out.0", "to_q", "to_v")]
    assert settings["transformer.target_modules"] == layers
    layers = load_file(folder / DIFFUSERS_FILE)
    diffusers.CogVideoXPipeline.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers={n.removeprefix("transformer."): t for n, t in layers.items()},
        transformer_lora_adapter_metadata={
            name.removeprefix("transformer."): value for name, value in settings.items()
        },
    )
    with safe_open(tmp_path / "theirs" / DIFFUSERS_FILE, framework="pt") as file:
        assert file.metadata() == written
    assert load_file(tmp_path / "theirs" / DIFFUSERS_FILE).keys() == layers.keys()


def matrices_in(dtype, rank, folder):
    """A LoRA run whose matrices have this type."""
    run = save_run(build({"r": rank, "lora_alpha": 5}), folder, base="0123456789abcdef")
    file = run / "20" / MODEL_FILES[0]
    state = torch.load(file)
    state["module"] = {name: matrix.to(dtype) for name, matrix in state["module"].items()}
    torch.save(state, file)
    return run


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.equal(other[name]), name


@pytest.mark.parametrize("rank", [1, 3, 70])  # 70: more than the width
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_no_bit_changes(export, bring_in, tmp_path, dtype, rank):
    run = matrices_in(dtype, rank, tmp_path / "run")
    *_, out = export(run)
    *_, back = bring_in(out)
    (matrices, record), (again, record_again) = read_lora(run), read_lora(back)
    assert_same(matrices, again)
    assert (
        record_again == record
        and record.base == "0123456789abcdef"
        and record.lora_alpha == 5
        and record.r == rank
    )
    *_, out_again = export(back, to="again")
    assert_same(load_file(out / DIFFUSERS_FILE), load_file(out_again / DIFFUSERS_FILE))
    headers = []
    for folder in (out, out_again):
        with safe_open(folder / DIFFUSERS_FILE, framework="pt") as file:
            headers.append(file.metadata())
    assert headers[0] == headers[1]


def test_an_older_file_is_exported_with_the_alpha_that_is_given(export, tmp_path):
    network = build(LORA)  # base and matrices in one file, as older runs saved
    path = tmp_path / "whole.pt"
    torch.save({"module": {MODEL_PREFIX + n: w for n, w in network.state_dict().items()}}, path)
    *_, folder = export(path, "--lora_alpha", 5)
    assert read_lora(folder)[1].lora_alpha == 5
    assert len(load_file(folder / DIFFUSERS_FILE)) == 16
    code, _, said, _ = export(path, to="default")
    assert code == 0 and "does not store its lora_alpha; 1 is used" in said
    assert read_lora(tmp_path / "default")[1].lora_alpha == 1


def test_a_folder_that_is_there_gets_the_file_and_keeps_its_own(export, tmp_path):
    run = save_run(build(LORA), tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert export(run)[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mine.txt", DIFFUSERS_FILE}
    before = (tmp_path / "out" / DIFFUSERS_FILE).read_bytes()
    code, _, error, _ = export(run)
    assert code == 1 and f"{DIFFUSERS_FILE} exists already" in error
    assert (tmp_path / "out" / DIFFUSERS_FILE).read_bytes() == before


def test_a_run_with_its_export_inside_is_still_read_as_the_run(export, tmp_path):
    run = save_run(build(LORA), tmp_path / "run", base="abc")
    assert export(run, to="run")[0] == 0
    assert read_lora(run)[1].base == "abc"


def test_a_lora_of_peft_is_imported_merged_and_trained_on(bring_in, tmp_path):
    peft = pytest.importorskip("peft")
    network = build()
    pipe = pipeline_with(network)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    pipe.transformer.add_adapter(config)
    randomize(pipe.transformer, lora=True)
    pipe.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers=peft.get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    base = save_base(network, tmp_path / "base.pt")
    code, said, _, folder = bring_in(tmp_path / "theirs", "--load", base)
    assert code == 0 and "rank 4, lora_alpha 6; to make videos with it: --lora" in said
    assert (folder / "latest").read_text() == "1" and (folder / "1" / MODEL_FILES[0]).is_file()
    record = {"r": 4, "lora_alpha": 6.0, "layer_range": [0, 1]}
    assert vars(read_lora(folder)[1]) == record | {"base": fingerprint(network.state_dict())}

    expected = predict(pipe.transformer)
    trained_on = build({"r": 4, "lora_alpha": 6})
    load_lora(trained_on, folder)
    merge_loras(network, [LoraChoice(str(folder))])
    for ours in (network, trained_on):
        torch.testing.assert_close(predict(ours), expected, rtol=0, atol=1e-4)


def test_what_is_in_the_wanted_format_already_is_written_anew(export, bring_in, tmp_path):
    run = save_run(build(LORA), tmp_path / "run")
    *_, folder = export(run)
    code, said, _, again = bring_in(run, to="sat")
    assert code == 0 and "to train from it, merge it" in said
    assert_same(read_lora(run)[0], read_lora(again)[0])
    code, *_, again = export(folder, to="again")
    assert code == 0
    assert_same(load_file(folder / DIFFUSERS_FILE), load_file(again / DIFFUSERS_FILE))


@pytest.mark.parametrize("base", ["\x1b[2J", "x" * 99, ""])
def test_a_base_that_is_no_fingerprint_is_not_believed(export, tmp_path, base):
    *_, folder = export(save_run(build(LORA), tmp_path / "run"))
    file = folder / DIFFUSERS_FILE
    save_file(load_file(file), file, metadata={BASE_KEY: base})
    assert read_lora(folder)[1].base is None


def test_an_import_without_alpha_takes_the_one_given(export, bring_in, tmp_path):
    *_, folder = export(save_run(build(LORA), tmp_path / "run"))
    file = folder / DIFFUSERS_FILE
    save_file(load_file(file), file)  # without metadata
    bring_in(folder, "--lora_alpha", 5)
    assert read_lora(tmp_path / "in")[1].lora_alpha == 5


@pytest.mark.parametrize("flag", [[], ["--fp16"], ["--bf16"]])
def test_merged_weights_are_a_model_as_the_loras_make_it(merge, tmp_path, flag):
    network = build()
    base = save_base(network, tmp_path / "base.pt")
    one = save_run(build(LORA), tmp_path / "one")
    two = save_run(build({"r": 2, "layer_range": [1]}), tmp_path / "two")
    code, said, _, folder = merge(base, "--lora", f"{one}:0.5", two, *flag)
    assert code == 0 and f"--load {folder}" in said
    merge_loras(network, [LoraChoice(str(one), 0.5), LoraChoice(str(two))])
    dtype = {"--fp16": torch.float16, "--bf16": torch.bfloat16}.get("".join(flag), torch.float32)
    expected = {name: weight.to(dtype) for name, weight in network.state_dict().items()}
    _, merged, lora = read_transformer(folder)
    assert_same(dict(merged), expected)
    assert not lora


def test_a_base_of_diffusers_is_merged_into_weights_of_sat(export, merge, tmp_path):
    pytest.importorskip("diffusers")
    network = build()
    build_theirs(network).save_pretrained(tmp_path / "theirs")
    *_, lora = export(save_run(build(LORA), tmp_path / "run"))
    code, *_, folder = merge(tmp_path / "theirs", "--lora", lora)
    assert code == 0
    merge_loras(network, [LoraChoice(str(lora))])
    _, merged, _ = read_transformer(folder)
    assert_same(
        dict(merged), {n: w for n, w in network.state_dict().items() if "pos_embed" not in n}
    )


def test_an_older_run_is_base_and_lora_at_once(merge, tmp_path):
    network = build(LORA)
    path = tmp_path / "whole.pt"
    state = {MODEL_PREFIX + n: w for n, w in network.state_dict().items()}
    torch.save({"module": state, "lora": {"r": 3, "lora_alpha": 5.0}}, path)
    assert merge(path, "--lora", path)[0] == 0
    merged = build()
    merged.load_state_dict(dict(read_transformer(tmp_path / "merged")[1]))
    torch.testing.assert_close(predict(merged), predict(network), rtol=0, atol=1e-5)


@pytest.fixture
def wrong(tmp_path):
    """What a user may name by mistake."""
    base = save_base(build(), tmp_path / "base.pt")
    run = save_run(build(LORA), tmp_path / "run")
    wide = save_run(build(LORA, hidden_size=128), tmp_path / "wide")
    damaged = tmp_path / "damaged.pt"
    state = torch.load(run / "20" / MODEL_FILES[0])
    del state["module"][f"{MODEL_PREFIX}{Q}.matrix_B.1"]
    torch.save(state, damaged)
    flat = tmp_path / "flat.pt"
    state = torch.load(base)
    state["module"][f"{MODEL_PREFIX}{Q}.weight"] = torch.zeros(5)
    torch.save(state, flat)
    files = {"base": base, "run": run, "wide": wide, "damaged": damaged, "flat": flat}
    return files | {"none": tmp_path / "none"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("export base", "is a whole model, not a LoRA"),
        ("export none", "--sat_pt_path: .*none does not exist"),
        ("export damaged", "damaged.pt does not fit .* 1 missing .*download or copy it again"),
        ("export run --lora_alpha 4", "was trained with lora_alpha=5, not 4"),
        ("bring_in base", "is a whole model, not a LoRA"),
        ("bring_in damaged", "1 missing .*download or copy it again"),
        (
            "bring_in wide --load base",
            "wide does not fit .*base.pt: .* the base model that the LoRA",
        ),
        ("merge base --lora wide", "wide does not fit .*base.pt: .* the base model that the LoRA"),
        ("merge flat --lora run", "run does not fit .*flat.pt: .* the base model that the LoRA"),
        ("merge base --lora base", "is a whole model, not a LoRA"),
        ("merge run --lora run", "is a LoRA, not a whole model; --load must name its base"),
        ("bring_in run --load run", "is a LoRA, not a whole model; --load must name its base"),
        ("bring_in none", "--lora_path: .*none does not exist"),
        ("bring_in none", "pytorch_lora_weights.safetensors, adapter_model.safetensors"),
        ("merge base --lora run:abc", "':abc' is not a number"),
        ("merge base --lora run:inf", "scale inf of .*run must be a finite number"),
    ],
)
def test_a_wrong_use_is_one_sentence_and_leaves_nothing(request, wrong, tmp_path, line, words):
    before = sorted(tmp_path.rglob("*"))
    name, *arguments = line.split()
    paths = {word: str(path) for word, path in wrong.items()}
    paths |= {f"run:{end}": f"{paths['run']}:{end}" for end in ("inf", "abc")}
    code, said, error, _ = request.getfixturevalue(name)(*(paths.get(w, w) for w in arguments))
    assert code == 1 and not said
    assert re.search(f"^error: .*{words}", error.splitlines()[-1]), error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["bring_in", "merge"])
def test_an_output_folder_that_exists_is_left_alone(request, wrong, tmp_path, name):
    (tmp_path / "there").mkdir()
    arguments = {"bring_in": [wrong["run"]], "merge": [wrong["base"], "--lora", wrong["run"]]}
    code, _, error, _ = request.getfixturevalue(name)(*arguments[name], to="there")
    assert code == 1 and "there exists already" in error
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("name", ["export", "export into a folder", "bring_in", "merge"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(request, wrong, tmp_path, name):
    if "into" in name:
        (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    arguments = [wrong["base"], "--lora", wrong["run"]] if name == "merge" else [wrong["run"]]
    run = request.getfixturevalue(name.split()[0])
    with full_disk():
        code, said, error, _ = run(*arguments)
    assert code == 1 and not said and "cannot be written" in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("tool", ["export_sat_lora_weight", "import_lora", "merge_lora"])
@pytest.mark.parametrize(
    ("flag", "code", "error", "lines"),
    [
        ("--help", 0, "", 0),
        ("--lora_pat", 2, "error: unknown argument '--lora_pat'; did you mean '--lora", 1),
    ],
)
def test_the_scripts_run_from_any_folder(tmp_path, tool, flag, code, error, lines):
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", flag]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(error) and done.stderr.count("\n") == lines
