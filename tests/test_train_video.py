"""The training command as its users meet it: two steps on drawn clips, all weights and LoRA."""

import itertools
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset

import train_video
from arguments import parse_config
from sgm.checkpoint.transformer import load_transformer
from sgm.config import LoraChoice, TrainingArgs
from sgm.data.loader import check_lengths, checked_batches
from sgm.errors import UserError
from sgm.preflight import find_weights
from sgm.training.deepspeed_engine import sat_optimizer, start_deepspeed
from sgm.training.deepspeed_settings import check_deepspeed, weight_dtype
from sgm.util import instantiate_from_config
from tests.lora_models import merge_loras
from tools import make_random_weights
from tools.tiny.draw_clips import write_clips
from tools.tiny.shapes import ShapeClips

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "cogvideox_tiny_sft.yaml")
# A folder that is not looked into before a mistake appears.
DATA = ["--train-data", "tests", "--valid-data", "tests"]
LORA = {
    "not_trainable_prefixes": ["all"],
    "lora_config": {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 2}},
}


def small_config(folder):
    """The fine-tuning configuration, cut down, for the weights and clips in `folder`."""
    config = OmegaConf.load(CONFIG)
    embedder = config.model.conditioner_config.params.emb_models[0]
    embedder.params.model_dir = str(folder / "t5")
    config.model.network_config.params.num_layers = 2
    config.model.first_stage_config.params.ckpt_path = str(folder / "3d-vae.pt")
    config.data.params.max_num_frames = 5
    config.deepspeed.train_micro_batch_size_per_gpu = 1
    config.args.load = str(folder / "transformer")
    config.args.train_data = config.args.valid_data = [str(folder / "clips")]
    config.args.train_iters = 2
    config.args.log_interval = 1
    return config


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """(configuration, what was logged, folder of the run) of a run of each kind."""
    folder = tmp_path_factory.mktemp("training")
    write_clips(ShapeClips(3, seed=0), folder / "clips")
    config = small_config(folder)
    OmegaConf.save(config, folder / "base.yaml")
    make_random_weights.main(["--base", str(folder / "base.yaml"), "--t5-layers", "1"])
    started = {}
    for name, extra in (("full", {}), ("lora", LORA)):
        own = OmegaConf.merge(config, {"args": {"save": str(folder / name)}, "model": extra})
        OmegaConf.save(own, folder / f"{name}.yaml")
        command = [sys.executable, ROOT / "train_video.py", "--device", "cpu"]
        started[name] = subprocess.Popen(
            [*command, "--base", folder / f"{name}.yaml"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )  # fmt: skip
    found = {}
    for name, process in started.items():
        log, _ = process.communicate(timeout=300)
        assert process.returncode == 0, log
        (run,) = (folder / name).iterdir()
        found[name] = (OmegaConf.load(folder / f"{name}.yaml"), log, run)
    return found


def weights(config, load):
    """The transformer's weights as inference reads them from `load`."""
    with torch.device("meta"):
        network = instantiate_from_config(OmegaConf.to_container(config.model.network_config))
    load_transformer(network, load, dtype=torch.float32, device="cpu")
    return {name: weight.detach() for name, weight in network.named_parameters()}


def losses(log):
    return [float(value) for value in re.findall(r"step \d of 2: loss (\S+) ", log)]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_logs_finite_losses_and_leaves_a_checkpoint(runs, kind):
    config, log, run = runs[kind]
    assert len(losses(log)) == 2 and all(math.isfinite(value) for value in losses(log))
    assert re.search(r"step 0: validation loss \d.*\n(.*\n)+step 2: validation loss \d", log)
    videos = sorted((run / "validation").rglob("*.mp4"))
    assert [video.parent.name for video in videos] == ["000000", "000002"]
    assert "3 of 3 clips can be used" in log
    assert (run / "latest").read_text() == "2"
    files = ["mp_rank_00_model_states.pt", "training_state.pt"]
    assert sorted(path.name for path in (run / "2").iterdir()) == files
    assert OmegaConf.load(run / "training_config.yaml").model == config.model


def test_fine_tuning_changes_the_transformer_and_saves_nothing_else(runs):
    config, _, run = runs["full"]
    before, after = weights(config, config.args.load), weights(config, run)
    blocks = [name for name in before if name.startswith("transformer.layers.")]
    assert len(blocks) > 10
    # Adam moves each weight that has a gradient by about the learning rate in its first steps.
    assert all(not torch.equal(before[name], after[name]) for name in blocks)
    assert all((before[name] - after[name]).abs().max() < 1e-3 for name in before)
    saved = torch.load(run / "2" / "mp_rank_00_model_states.pt")["module"]
    assert all(name.startswith("model.diffusion_model.") for name in saved)


def test_a_lora_run_leaves_its_matrices_which_inference_merges(runs):
    config, _, run = runs["lora"]
    path = run / "2" / "mp_rank_00_model_states.pt"
    saved = torch.load(path)
    assert saved["lora"]["r"] == 2
    assert all(".matrix_" in name for name in saved["module"]) and saved["module"]
    assert path.stat().st_size < 100_000
    before = weights(config, config.args.load)
    with torch.device("meta"):
        network = instantiate_from_config(OmegaConf.to_container(config.model.network_config))
    base = load_transformer(network, config.args.load, dtype=torch.float32, device="cpu")
    merge_loras(network, [LoraChoice(str(run))], base=base)
    wrapped = ("query_key_value.weight", "attention.dense.weight")
    for name, weight in network.named_parameters():
        assert torch.equal(weight, before[name]) != name.endswith(wrapped)


def test_lora_starts_as_the_model_itself(runs):
    # The same clip, noise and arithmetic, as B is zero: equal as far as the log shows.
    assert losses(runs["lora"][1])[0] == losses(runs["full"][1])[0]


def test_data_without_usable_clips_is_an_error_that_says_the_layout(tmp_path):
    config = parse_config(TrainingArgs, "", ["--base", CONFIG])
    with pytest.raises(UserError, match="labels/NAME.txt"):
        train_video.build_dataset(config, [str(tmp_path)])
    config.args.train_data = []
    with pytest.raises(UserError, match="args.train_data is empty"):
        train_video.check(config)


@pytest.mark.parametrize("name", ["none", "~nouser/none", "none" * 75])
def test_absent_data_says_how_to_draw_some(name):
    config = parse_config(TrainingArgs, "", ["--base", CONFIG, "--train-data", name])
    with pytest.raises(
        UserError, match="none does not exist.*draw_clips --output .*none --count 64"
    ):
        train_video.check(config)


def changed(key, value, folder):
    """Arguments of the bundled model's fine-tuning with one key of its file changed."""
    config = OmegaConf.load(CONFIG)
    OmegaConf.update(config, key, value, merge=False)
    path = folder / "changed.yaml"
    OmegaConf.save(config, path)
    return ["--base", str(path), "--save", str(folder / "runs")]


MODEL = "model.first_stage_config.params"
WRONG = {
    "args.num_workers": [-1],
    "args.eval_batch_size": [0],
    "args.seed": [2**63, -(2**63) - 1],
    "args.load": [None, "none"],
    "deepspeed.train_micro_batch_size_per_gpu": [0, True, "auto", 1.5],
    "deepspeed.zero_optimization": [3, [1]],
    "deepspeed.zero_optimization.elastic_checkpoint": [True],
    "deepspeed.bf16": [True],
    "deepspeed.gradient_clipping": ["a", True, -1, math.nan],
    "args.experiment_name": ["a/b", "", "a\0b", "a" * 300],
    "args.bf16": [True],
    "args.warmup": [-0.1, 1.1, math.nan],
    "args.ema_decay": [1.0, math.nan],
    "args.lr_decay_ratio": [0.0, math.nan],
    "deepspeed.zero_optimization.stage": ["two", 4, -1],
    "deepspeed.optimizer": ["Adam", None],
    "deepspeed.optimizer.params": [[1]],
    "deepspeed.optimizer.type": [None, "sat.ops.LayerNorm", "sat.ops.os.system"],
    "data.params.video_size": [[60, 90], [128, 96], "64x96", None],
    "data.params.max_num_frames": [21],
    f"{MODEL}.ckpt_path": [None, "none.pt", 3],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in WRONG.items() for v in vs])
def test_a_wrong_value_is_named_before_a_folder_is_made_or_data_read(
    tmp_path, monkeypatch, key, value
):
    monkeypatch.setattr(train_video, "build_dataset", lambda *_, **__: pytest.fail("too late"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    base = changed(key, value, tmp_path)
    with pytest.raises(UserError) as failure:
        train_video.main([*base, *DATA, "--device", "cpu"])
    assert key.rpartition(".")[2].split("_per_")[0] in str(failure.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("", "save: '' must be a string that is not empty"),
        ("a\0b", "cannot be written to .*null byte"),
    ],
)
def test_an_empty_or_impossible_folder_for_runs_is_one_sentence(monkeypatch, folder, said):
    monkeypatch.setattr(train_video, "build_dataset", lambda *_, **__: pytest.fail("too late"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UserError, match=said):
        train_video.main(["--base", CONFIG, *DATA, "--device", "cpu", "--save", folder])


def test_a_mistyped_key_of_deepspeed_is_named_and_a_strange_one_warned_of(caplog):
    settings = parse_config(TrainingArgs, "", ["--base", CONFIG]).deepspeed
    check_deepspeed(settings | {"prescale_gradients": False})
    assert caplog.messages == []
    check_deepspeed(settings | {"quantum_offload": {}})
    assert "unknown key 'quantum_offload' in deepspeed" in caplog.text
    with pytest.raises(UserError, match="'gradient_cliping' in deepspeed; did you mean"):
        check_deepspeed(settings | {"gradient_cliping": 0.1})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stge", 2, "'stge' in deepspeed.zero_optimization; did you mean 'stage'"),
        (
            "offload_optimizer",
            {"devce": "cpu"},
            "'devce' in deepspeed.zero_optimization.offload_optimizer; did you mean 'device'",
        ),
        (
            "leaf_module",
            {"clases": []},
            "'clases' in deepspeed.zero_optimization.leaf_module; did you mean 'classes'",
        ),
        ("stage3_prefetch_buket_size", 5, "did you mean 'stage3_prefetch_bucket_size'"),
        ("reduce_bucket_size", -1, "zero_optimization.reduce_bucket_size: -1: .* than 0"),
        # Of the section as a whole, by pydantic and by DeepSpeed itself.
        ("offload_optimizer", {"device": "cpu", "ratio": 0.5}, "zero_optimization: .*ZeRO Stage 3"),
        ("load_from_fp32_weights", "perhaps", "load_from_fp32_weights: 'perhaps': .*boolean"),
    ],
)
def test_a_mistake_in_a_section_of_deepspeed_is_named_before_data_is_read(
    tmp_path, monkeypatch, key, value, message
):
    monkeypatch.setattr(train_video, "build_dataset", lambda *_, **__: pytest.fail("too late"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    base = changed(f"deepspeed.zero_optimization.{key}", value, tmp_path)
    with pytest.raises(UserError, match=message):
        train_video.main([*base, *DATA, "--device", "cpu"])


def test_attention_that_does_not_run_here_is_refused_before_data_is_read(monkeypatch):
    monkeypatch.setattr(train_video, "build_dataset", lambda *_, **__: pytest.fail("too late"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UserError, match="attention: flash does not run here"):
        train_video.main(["--base", CONFIG, *DATA, "--device", "cpu", "--attention", "flash"])


def test_the_kernel_of_attention_is_the_one_asked_for():
    config = parse_config(TrainingArgs, "", ["--base", CONFIG, *DATA, "--attention", "sdpa"])
    engine, load_weights = train_video.build_engine(config, train_video.check(config))
    load_weights(torch.device("cpu"))
    network = engine.model.diffusion_model
    assert network.mixins["adaln_layer"].attention == "sdpa"


def check_sections(sections):
    """Check a section `deepspeed` of these sections and an optimizer."""
    check_deepspeed({"optimizer": {"type": "AdamW"}} | sections)


def test_a_section_that_deepspeed_refuses_by_itself_is_one_sentence():
    both = {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}
    with pytest.raises(UserError, match="^deepspeed.zero_optimization: .*cpu_off"):
        check_sections({"zero_optimization": both})
    with pytest.raises(UserError, match="^deepspeed: TypeError: keywords must be strings"):
        check_sections({"fp16": {1: 2}})
    sizes = {"train_batch_size": 5, "train_micro_batch_size_per_gpu": 2}
    with pytest.raises(UserError, match="^deepspeed: AssertionError: .*train_batch_size"):
        check_sections(sizes | {"gradient_accumulation_steps": 1})


@pytest.mark.parametrize("stage", [{}, {"zero_optimization": {"stage": 0}}])
def test_float16_without_zero_is_refused(stage):
    """DeepSpeed divides its gradients by a scale that it did not multiply the loss by."""
    half = {"fp16": {"enabled": True}}
    with pytest.raises(UserError, match="fp16: .* without ZeRO, .*; set zero_opt.* use bf16"):
        check_sections(half | stage)
    check_sections(half | {"zero_optimization": {"stage": 1}})
    check_sections({"fp16": {"enabled": False}} | stage)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"enabled": True, "dtype": "float16"},
            "dtype: 'float16' must be bfloat16; .*section fp16",
        ),
        ({"enabled": True, "dtype": "half a byte"}, "dtype: 'half a byte' must be bfloat16"),
        ({"enabled": True}, "dtype: None must be bfloat16"),
        ({"enabld": True}, "'enabld' in deepspeed.torch_autocast; did you mean 'enabled'"),
    ],
)
def test_autocast_is_bfloat16(section, message):
    with pytest.raises(UserError, match=message):
        check_sections({"torch_autocast": section})
    for dtype in ("bf16", "torch.bfloat16"):
        check_sections({"torch_autocast": {"enabled": True, "dtype": dtype}})
    check_sections({"torch_autocast": {"enabled": False, "dtype": "float16"}})


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": {"enabled": 1}}, torch.bfloat16),
        ({"bfloat16": {"enabled": True}}, torch.bfloat16),  # its older name
        ({"fp16": {"enabled": True}}, torch.float16),
        ({"fp16": {"enabled": False}, "bf16": {}}, torch.float32),
    ],
)
def test_the_precision_of_weights_is_as_deepspeed_reads_it(settings, dtype):
    read = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1} | settings)
    enabled = (read.bfloat16_config.enabled, read.float16_config.enabled)
    assert enabled == (dtype == torch.bfloat16, dtype == torch.float16)
    assert weight_dtype(settings) == dtype


def test_two_precisions_are_refused_and_sections_without_value_are_absent():
    half = {"enabled": True}
    with pytest.raises(UserError, match="bfloat16 and fp16 modes cannot be simul"):
        check_sections({"bf16": half, "fp16": half, "zero_optimization": {"stage": 1}})
    check_sections(dict.fromkeys(["bf16", "bfloat16", "fp16", "torch_autocast"]))
    check_sections({"fp16": half | {"loss_scale": 1}})  # which needs no scale


@pytest.fixture
def placed(t5_folder, tmp_path):
    """A `model` section whose weights are there, and `load`."""
    model = parse_config(TrainingArgs, "", ["--base", CONFIG]).model
    (tmp_path / "t5").symlink_to(t5_folder)
    for name in ("vae.pt", "transformer.pt"):
        torch.save({"module": {"any": torch.zeros(9)}}, tmp_path / name)
    embedder = model["conditioner_config"]["params"]["emb_models"][0]
    embedder["params"]["model_dir"] = "~/t5"
    model["first_stage_config"]["params"]["ckpt_path"] = "~/vae.pt"
    return model, embedder, "~/transformer.pt"


def test_weights_that_are_there_pass_and_what_is_not_needed_may_be_absent(
    placed, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, embedder, load = placed
    find_weights(model, load)
    find_weights(model, None, random_transformer=True)
    embedder |= {"target": "elsewhere.Embedder", "params": {}}
    model["first_stage_config"]["params"]["ckpt_path"] = None
    find_weights(model | {"latent_input": True}, load)


def test_each_absent_weight_is_named(placed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, embedder, load = placed
    with pytest.raises(UserError, match="args.load is not set"):
        find_weights(model, None)
    (tmp_path / "t5").unlink()
    with pytest.raises(
        UserError, match=rf"emb_models\[0\].params.model_dir: .*{tmp_path}/t5' is not"
    ):
        find_weights(model, load)
    embedder["params"] = None
    with pytest.raises(UserError, match="model_dir is not set"):
        find_weights(model, load)
    (tmp_path / "vae.pt").unlink()
    with pytest.raises(UserError, match=f"ckpt_path: .*{tmp_path}/vae.pt does not exist"):
        find_weights(model, load)
    (tmp_path / "transformer.pt").unlink()
    with pytest.raises(UserError, match="load: .* does not exist"):
        find_weights(model, load)


@pytest.mark.parametrize("name", ["vae.pt", "transformer.pt"])
def test_weights_that_were_cut_off_are_named(placed, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, _, load = placed
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-99])
    found = find_weights(model, load)
    with pytest.raises(UserError, match=f"{name} is not a whole file"):
        for file in (*found.autoencoder.files, *found.transformer.files):
            file.read()


def test_a_mistyped_key_of_weights_is_named(placed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, embedder, load = placed
    embedder["params"] = {"modeldir": "~/t5"}
    with pytest.raises(UserError, match=r"model_dir is not set \(is 'modeldir' mistyped"):
        find_weights(model, load)
    model["first_stge_config"] = model.pop("first_stage_config")
    with pytest.raises(
        UserError, match=r"first_stage_config is missing \(is 'first_stge_config' mis"
    ):
        find_weights(model, load)


def test_a_configuration_without_deepspeed_is_none_for_training():
    with pytest.raises(
        UserError, match="section deepspeed, which is missing .* such as configs/cogvideox_2b_sft"
    ):
        check_deepspeed({})


@pytest.mark.parametrize(("in_args", "in_network"), [*itertools.product([True, False], repeat=2)])
def test_activations_are_recomputed_only_where_both_keys_say_so(small_model, in_args, in_network):
    config = parse_config(TrainingArgs, "", ["--base", CONFIG])
    network = small_model["network_config"]["params"]
    network.setdefault("transformer_args", {})["checkpoint_activations"] = in_network
    config.model = small_model | {"loss_fn_config": config.model["loss_fn_config"]}
    config.args.mode, config.args.checkpoint_activations = "pretrain", in_args
    config.args.checkpoint_keep = "attention"
    weights = find_weights(config.model | {"latent_input": True}, None, random_transformer=True)
    engine, load_weights = train_video.build_engine(config, weights)
    load_weights(torch.device("cpu"))
    train_video.set_up_activations(engine, config)
    expected = "attention" if in_args and in_network else None
    assert engine.model.diffusion_model.checkpointing == expected


@pytest.mark.parametrize("kind", [TypeError, AttributeError, ImportError, KeyError, ValueError])
def test_what_deepspeed_refuses_is_one_sentence(monkeypatch, kind):
    def refuse(**_):
        raise kind("lr\nand more")

    monkeypatch.setattr("deepspeed.initialize", refuse)
    config = parse_config(TrainingArgs, "", ["--base", CONFIG])
    with pytest.raises(UserError, match=f"DeepSpeed rejects its settings: {kind.__name__}: .*lr"):
        start_deepspeed(torch.nn.Linear(1, 1), config.deepspeed, config.args)


@pytest.mark.parametrize("kind", [IndexError, OSError, RuntimeError])
def test_an_optimizer_that_cannot_be_compiled_is_one_sentence(monkeypatch, kind):
    def fail(weights, lr):
        raise kind("no compiler")  # with PyTorch for CPUs it is an IndexError

    monkeypatch.setattr("sat.ops.FusedEmaAdam", fail)
    with pytest.raises(UserError, match="sat.ops.FusedEmaAdam cannot be compiled.*use type: AdamW"):
        sat_optimizer([], params={"lr": 1})


def test_clips_of_different_lengths_are_found_before_anything_is_loaded() -> None:
    parts = [SimpleNamespace(item_lengths=[17, 5]), SimpleNamespace(item_lengths=[17])]
    check_lengths(parts, batch_size=1, key="size")
    check_lengths([*parts[1:], object()], batch_size=2, key="size")
    told = r"1 with 5 frames, 2 with 17 frames\), so they cannot share a batch of 2; set size to 1"
    with pytest.raises(UserError, match=told):
        check_lengths(parts, batch_size=2, key="size")


class Unusable(Dataset):
    """Data that a worker process finds to be unusable."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> None:
        raise UserError("none of the clips can be decoded")


def test_a_workers_sentence_arrives_without_its_stack_trace() -> None:
    with pytest.raises(UserError) as failure:
        next(checked_batches(DataLoader(Unusable(), num_workers=1)))
    assert str(failure.value) == "none of the clips can be decoded"


class Fatal(Dataset):
    """Its process is ended, as by a system that is short of memory."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_ended_while_it_reads_data_is_one_sentence() -> None:
    with pytest.raises(UserError, match="reads data was killed .DataLoader worker .*; lower num_w"):
        next(checked_batches(DataLoader(Fatal(), num_workers=1)))


class Faulty(Fatal):
    """It has a fault of its own, which is not to be hidden."""

    def __getitem__(self, index: int) -> None:
        raise RuntimeError("the real cause")


def test_a_fault_in_a_dataset_keeps_its_cause() -> None:
    with pytest.raises(RuntimeError, match="the real cause"):
        next(checked_batches(DataLoader(Faulty(), num_workers=1)))
