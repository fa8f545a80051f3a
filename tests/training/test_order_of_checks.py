"""A mistake in the configuration or in a weight file appears before any data is read."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import train_video
from sgm.errors import UserError
from sgm.training.deepspeed_settings import check_deepspeed
from tests.training.conftest import LORA

ADAM = {"optimizer": {"type": "Adam"}}
LOSS = "loss_fn_config.params"
T5 = "conditioner_config.params.emb_models"
BUNDLED = Path(__file__).resolve().parents[2] / "CogVideoX-tiny-sat"


SHAPES = {"A": (3, 8), "B": (8, 3)}

MISTAKES = {
    "a mistyped key of the loss": ({f"{LOSS}.offset_noise_lvl": 0.0}, "unknown key 'offset_noise"),
    "an unknown class of the loss": ({"loss_fn_config.target": "sgm.nothing.Loss"}, "no module"),
    "no loss": ({"loss_fn_config": None}, "loss_fn_config is missing"),
    "another sampler": ({"sampler_config.target": "torch.nn.ReLU"}, "unknown key 'num_steps'"),
    "a mistyped key of the denoiser": ({"denoiser_config.params.idx": 1}, "unknown key 'idx'"),
    "a mistyped key beside T5": ({f"{T5}[0].is_trained": True}, "unknown key 'is_trained'"),
    "a mistyped key of T5": ({f"{T5}[0].params.max_len": 9}, "unknown key 'max_len'"),
    "a prefix without a match": ({"not_trainable_prefixes": ["transformr."]}, "begins with 'trans"),
    "nothing to train": ({"not_trainable_prefixes": ["all"]}, "no weight is trained"),
    "a network of other sizes": (
        {"network_config.params.num_layers": 3},
        "does not fit the model of the configuration",
    ),
    "another autoencoder": (
        {"first_stage_config.params.ckpt_path": str(BUNDLED / "transformer/3078")},
        "3d-vae.pt does not exist",
    ),
    "an autoencoder of other sizes": (
        {"first_stage_config.params.encoder_config.params.num_res_blocks": 3},
        "does not fit the model of the configuration",
    ),
    "a trained text encoder": (
        {f"{T5}[0].is_trainable": True},
        "FrozenT5Embedder, .*is_trainable: false",
    ),
    "another text encoder": ({f"{T5}[0].params.model_dir": str(BUNDLED / "vae")}, "T5 folder"),
}


@pytest.fixture
def refuse(small, tmp_path, monkeypatch):
    """Checks that a run with a cache ends with `words` before its data is looked at."""
    monkeypatch.setattr(train_video, "load_data", lambda *_: pytest.fail("too late"))

    def check(changes, words, *flags):
        config = OmegaConf.load(small.file("mistake"))
        for key, value in changes.items():
            OmegaConf.update(config.model, key, value, force_add=True)
        OmegaConf.save(config, tmp_path / "mistake.yaml")
        flags = ("--cache-dir", str(tmp_path / "cache"), *flags)
        with pytest.raises(UserError, match=words):
            small.train(str(tmp_path / "mistake.yaml"), tmp_path / "runs", *flags)

    return check


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_found_before_data_is_read(refuse, kind):
    refuse(*MISTAKES[kind])


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"optimizer": {"type": "Adamx"}}, "optimizer.type: 'Adamx' is unknown; did you mean 'Ada"),
        ({"optimizer": {"type": "AdamW", "params": {"betass": [0, 1]}}}, "params: .*'betass'"),
        ({"optimizer": {"type": "sgd", "params": {"lr": 1.0}}}, "type: 'sgd' is unknown"),
        ({"optimizer": {"type": "SGD", "params": {"lr": "abc"}}}, "optimizer.params: "),
        (ADAM | {"scheduler": {"type": "WarmupXX"}}, "scheduler.type: 'WarmupXX' is unknown"),
    ],
)
def test_a_mistake_in_optimizer_or_schedule_is_found_with_the_sections(section, words):
    with pytest.raises(UserError, match=words):
        check_deepspeed(section)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "adam_w_mode": False}},
        {"type": "sat.ops.FusedEmaAdam", "params": {"anything": 1}},
        {"type": "Lion", "params": {"betas": [0.9, 0.99]}},
        {"type": "SGD", "params": {"lr": 0.1}},
    ],
)
def test_optimizers_that_exist_pass(optimizer):
    check_deepspeed({"optimizer": optimizer, "scheduler": {"type": "WarmupLR"}})


def test_a_text_encoder_of_another_width_is_found_before_data_is_read(refuse):
    key = "network_config.params.modules.patch_embed_config.params.text_hidden_size"
    refuse({key: 48}, "text_hidden_size in patch_embed_config is 48", "--mode", "pretrain")


@pytest.mark.parametrize("name", ["3d-vae.pt", "transformer/1000/mp_rank_00_model_states.pt"])
def test_a_damaged_file_is_found_before_data_is_read(small, refuse, tmp_path, name):
    whole = (small.folder / name).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:-99])
    if name == "3d-vae.pt":
        refuse({"first_stage_config.params.ckpt_path": str(tmp_path / "cut.pt")}, "not a whole")
    else:
        refuse({}, "not a whole", "--load", str(tmp_path / "cut.pt"))


def test_a_lora_of_another_rank_is_found_before_data_is_read(small, refuse, tmp_path):
    run = tmp_path / "runs" / "a"
    layer = "model.diffusion_model.transformer.layers.0.attention.dense"
    matrices = {f"{layer}.matrix_{kind}.0": torch.zeros(shape) for kind, shape in SHAPES.items()}
    record = {"r": 3, "lora_alpha": 1.0, "layer_range": [0], "base": None}
    (run / "5").mkdir(parents=True)
    torch.save({"module": matrices, "lora": record}, run / "5" / "mp_rank_00_model_states.pt")
    (run / "latest").write_text("5")
    refuse(LORA, "was trained with r=3, but lora_config says 2", "--resume", str(run))
