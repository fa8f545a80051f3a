"""Every shipped configuration, and one with the names of older files, builds the engine."""

import re
from pathlib import Path

import pytest
import torch

from arguments import parse_config
from sgm import util
from sgm.config import SamplingArgs, TrainingArgs
from sgm.engine import SATVideoDiffusionEngine
from sgm.errors import UserError, mistyped_as
from sgm.util import check_params, get_class

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# The files of each command line, and what must be allowed for it.
SHIPPED = {
    "cogvideox_2b_infer.yaml": (SamplingArgs, [], []),
    "cogvideox_tiny_infer.yaml": (SamplingArgs, [], []),
    "cogvideox_2b_sft.yaml": (TrainingArgs, [], []),
    "cogvideox_tiny_sft.yaml": (TrainingArgs, [], []),
    "cogvideox_tiny_lora.yaml": (TrainingArgs, ["cogvideox_tiny_sft.yaml"], []),
    "cogvideox_tiny_lesson.yaml": (
        TrainingArgs,
        ["cogvideox_tiny_sft.yaml", "cogvideox_tiny_lora.yaml"],
        [],
    ),
    "cogvideox_tiny_train.yaml": (TrainingArgs, ["cogvideox_tiny_infer.yaml"], ["tools"]),
}


def parse(name):
    args_class, below, _ = SHIPPED[name]
    return parse_config(args_class, "", ["--base", *(str(CONFIGS / n) for n in [*below, name])])


def shrink(model, t5_folder):
    """Small sizes, and no files of weights, in a `model` section; all else stays as it is."""
    network = model["network_config"]["params"]
    network |= {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "time_embed_dim": 16}
    network["modules"]["patch_embed_config"]["params"]["text_hidden_size"] = 64
    for embedder in model["conditioner_config"]["params"]["emb_models"]:
        embedder["params"]["model_dir"] = str(t5_folder)
    vae = model["first_stage_config"]["params"]
    vae["ckpt_path"] = None
    for part in ("encoder_config", "decoder_config"):
        vae[part]["params"] |= {"ch": 32, "num_res_blocks": 1}
    return model


def build(model):
    return SATVideoDiffusionEngine(**check_params(SATVideoDiffusionEngine, model, where="model"))


def test_every_shipped_file_is_tested_here():
    assert sorted(SHIPPED) == sorted(path.name for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_no_key_of_a_shipped_file_is_taken_for_another_mistyped(name):
    model = parse(name).model
    for section in (model, model["network_config"]["params"]):
        for key in section:
            assert not mistyped_as(key, dict.fromkeys(section.keys() - {key}))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_builds_the_engine(name, t5_folder, monkeypatch):
    args_class, _, allowed = SHIPPED[name]
    monkeypatch.setattr(util, "_allowed_prefixes", [*util._allowed_prefixes, *allowed])
    config = parse(name)
    network = config.model["network_config"]["params"]
    frame = (network["in_channels"], network["latent_height"], network["latent_width"])
    engine = build(shrink(config.model, t5_folder))
    assert engine.model.diffusion_model.frame_shape == frame
    assert engine.sampler is not None
    if args_class is TrainingArgs:
        assert engine.loss_fn is not None and config.deepspeed["optimizer"]["type"]
        data_class = get_class(config.data["target"])
        params = (config.data.get("params") or {}) | {"data_dir": "clips"}
        check_params(data_class, params, where="data")
    else:
        assert config.args.latent_channels == frame[0]
        assert [8 * size for size in frame[1:]] == config.args.sampling_image_size


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.endswith("sft.yaml")])
def test_lora_is_a_matter_of_removing_the_comment_signs(name, t5_folder, tmp_path):
    text = (CONFIGS / name).read_text(encoding="utf-8")
    # The lines of the block; the sentence above it stays a comment.
    without = re.sub(r"(?m)^  # (not_trainable_prefixes|lora_config|  )", r"  \1", text)
    assert without != text
    path = tmp_path / name
    path.write_text(without, encoding="utf-8")
    model = parse_config(TrainingArgs, "", ["--base", str(path)]).model
    assert trained(build(shrink(model, t5_folder)).model) == {"matrix_A", "matrix_B"}


def trained(module):
    """Kinds of the weights that are trained: the last name before their numbers."""
    names = [name for name, weight in module.named_parameters() if weight.requires_grad]
    return {name.rstrip("0123456789.").rpartition(".")[2] for name in names}


def fill(module):
    """Random weights, the same for every module with the same names."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in sorted(module.named_parameters()):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))


def draw(engine):
    fill(engine)
    cond = engine.eval().conditioner.encode(["a red circle"])
    uncond = engine.conditioner.unconditional(cond)
    generator = torch.Generator().manual_seed(0)
    *_, step = engine.sample_steps(cond, uncond, (1, 3, 4, 4, 6), generator=generator)
    return step.x


def test_old_names_build_an_engine_that_samples_with_lora_in_either_place(small_model):
    in_modules = build(small_model)
    moved = small_model["network_config"]["params"]["modules"].pop("lora_config")
    plain = build(small_model)
    under_model = build(small_model | {"lora_config": moved})

    latents = draw(in_modules)
    assert latents.isfinite().all() and latents.std() > 0.1
    assert trained(in_modules) == trained(under_model) == {"matrix_A", "matrix_B"}
    assert trained(plain) == set()
    assert torch.equal(draw(under_model), latents)
    assert not torch.equal(draw(plain), latents)
    video = torch.cat(list(in_modules.decode_first_stage(latents)), dim=1)
    assert video.shape == (1, 9, 3, 32, 48) and video.isfinite().all()


def test_lora_in_both_places_must_agree(small_model):
    lora = small_model["network_config"]["params"]["modules"]["lora_config"]
    build(small_model | {"lora_config": dict(lora)})
    with pytest.raises(UserError, match="different values"):
        build(small_model | {"lora_config": lora | {"params": {"r": 2}}})


def test_a_parameter_that_no_file_ever_had_is_refused(small_model):
    small_model["network_config"]["params"]["adm_channels"] = 1
    with pytest.raises(UserError, match="unknown key 'adm_channels'"):
        build(small_model)
