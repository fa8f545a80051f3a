"""The engine: its training loss, the way into latents and back, and what is trained."""

import math
import weakref

import pytest
import torch

from sgm.engine import NetworkWrapper, SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.models.autoencoder import encode_moments
from sgm.training.loop import TrainingObjective
from sgm.util import check_params, instantiate_from_config

SCALE = 1.15258426


def loss_of(engine, batch):
    """The training loss of a batch, as the loop computes it."""
    return TrainingObjective(engine)(*engine.get_input(batch))


@pytest.fixture
def build(small_model):
    """Makes an engine of the small configuration, without LoRA, with weights that do something."""

    def make(**changes):
        small_model["network_config"]["params"]["modules"].pop("lora_config", None)
        model = {**small_model, "not_trainable_prefixes": []} | changes
        params = check_params(SATVideoDiffusionEngine, model, where="model")
        engine = SATVideoDiffusionEngine(**params)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, weight in sorted(engine.named_parameters()):
                if weight.requires_grad:
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        return engine

    return make


@pytest.fixture
def video():
    return torch.rand(2, 9, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


TEXTS = ["a red circle", "a blue square"]


def test_the_loss_is_finite_and_reaches_every_weight_of_the_transformer_only(build, video):
    engine = build().train()
    # A fixed unconditional share would hide the text; here it is never dropped.
    engine.conditioner.ucg_rates = [0.0]
    loss = loss_of(engine, {"mp4": video, "txt": TEXTS})
    assert loss.shape == () and loss.isfinite() and loss > 0
    loss.backward()
    for name, weight in engine.named_parameters():
        if name.startswith("model.diffusion_model."):
            used = "pos_embedding" not in name
            assert not used or (weight.grad is not None and weight.grad.isfinite().all()), name
        else:
            assert weight.grad is None and not weight.requires_grad, name


def test_a_step_against_the_gradient_lowers_the_loss(build, video):
    engine = build().train()

    def loss():
        torch.manual_seed(0)  # the same noise, noise level and dropped texts
        return loss_of(engine, {"mp4": video, "txt": TEXTS})

    before = loss()
    before.backward()
    weights = [weight for weight in engine.parameters() if weight.grad is not None]
    with torch.no_grad():
        norm = torch.stack([weight.grad.norm() for weight in weights]).norm()
        for weight in weights:
            weight -= 1e-2 / norm * weight.grad
    assert loss() < before


def test_latents_in_the_batch_give_the_loss_of_the_video_they_come_from(build, video):
    whole, latent = build(), build(latent_input=True)
    assert latent.first_stage_model is None
    torch.manual_seed(0)
    latents = whole.encode_first_stage(video)
    # What follows draws the same numbers as the same loss over the video will, after encoding.
    from_latents = loss_of(latent, {"mp4": latents / SCALE, "txt": TEXTS})
    torch.manual_seed(0)
    from_video = loss_of(whole, {"mp4": video, "txt": TEXTS})
    # Dividing by the scale and multiplying again moves latents by one rounding.
    torch.testing.assert_close(from_latents, from_video, rtol=1e-5, atol=0)
    from_latents.backward()


def test_the_video_may_have_another_key(build, video):
    engine = build(input_key="clip")
    assert loss_of(engine, {"clip": video, "txt": TEXTS}).isfinite()


def test_a_video_goes_into_latents_and_back_in_shape(build, video):
    engine = build()
    latents = engine.encode_first_stage(video)
    assert latents.shape == (2, 3, 4, 4, 6) and latents.dtype == torch.float32
    chunks = list(engine.decode_first_stage(latents))
    assert torch.cat(chunks, dim=1).shape == video.shape
    assert not latents.requires_grad and not chunks[0].requires_grad


def test_latents_are_multiplied_by_the_scale_and_divided_before_decoding(build, video):
    engine = build()
    pixels = video.transpose(1, 2)  # (b, c, t, h, w)
    torch.manual_seed(0)
    scaled = engine.encode_first_stage(video)
    torch.manual_seed(0)
    plain = engine.first_stage_model.encode(pixels).detach()
    assert torch.equal(scaled, plain.transpose(1, 2) * SCALE)
    decoded = torch.cat(list(engine.decode_first_stage(scaled)), dim=1)
    expected = engine.first_stage_model.decode(plain).detach().transpose(1, 2)
    # One rounding from the division, through a network whose outputs are about 1.
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4)


def test_a_chunk_comes_when_the_next_one_is_on_its_way(build):
    engine, calls = build(), []
    engine.first_stage_model.decoder.register_forward_hook(lambda *_: calls.append(1))
    chunks = engine.decode_first_stage(torch.randn(1, 7, 4, 4, 6))
    seen = [len(calls) for _ in chunks]
    assert seen == [2, 3, 3]


def test_decoding_is_float32_whatever_the_weights_are(build, video):
    engine = build(dtype=torch.bfloat16)
    latents = engine.encode_first_stage(video)
    assert latents.dtype == torch.float32
    assert next(engine.decode_first_stage(latents)).dtype == torch.float32


def test_the_transformer_runs_in_its_own_precision_with_float32_around_it(build):
    network = build(dtype=torch.bfloat16).model
    assert isinstance(network, NetworkWrapper)
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    cond = {"crossattn": torch.zeros(1, 8, 64)}
    output = network(torch.randn(1, 3, 4, 4, 6), torch.tensor([500]), cond)
    assert output.dtype == torch.float32 and output.shape == (1, 3, 4, 4, 6)


def names_of_trained(engine):
    return {name for name, weight in engine.named_parameters() if weight.requires_grad}


def test_all_leaves_only_the_matrices_of_lora_to_be_trained(build, video):
    lora = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 2}}
    engine = build(not_trainable_prefixes=["all"], lora_config=lora).train()
    matrices = {
        name
        for name, _ in engine.named_parameters()
        if ".matrix_A." in name or ".matrix_B." in name
    }
    # Two layers of two attention projections: three parts of query_key_value and one of dense.
    assert names_of_trained(engine) == matrices and len(matrices) == 2 * (3 + 1) * 2
    loss_of(engine, {"mp4": video, "txt": TEXTS}).backward()
    assert {n for n, weight in engine.named_parameters() if weight.grad is not None} == matrices


def test_a_prefix_keeps_the_weights_under_it_from_training(build):
    every = names_of_trained(build())
    rest = names_of_trained(build(not_trainable_prefixes=["transformer.", "time_embed."]))
    prefix = "model.diffusion_model."
    left_out = {n for n in every if n.startswith((f"{prefix}transformer.", f"{prefix}time_embed."))}
    assert left_out and rest == every - left_out


@pytest.mark.parametrize("value", ["all", 3, [3], [""], {"all": 1}])
def test_prefixes_are_a_list_of_texts(build, value):
    with pytest.raises(UserError, match=r"not_trainable_prefixes: .*\['all'\]"):
        build(not_trainable_prefixes=value)


def test_null_prefixes_keep_nothing_from_training(build):
    assert names_of_trained(build(not_trainable_prefixes=None)) == names_of_trained(build())


def test_a_prefix_of_no_weight_is_an_error(build):
    with pytest.raises(UserError, match="'transfomer.'.*did you mean 'transformer.'"):
        build(not_trainable_prefixes=["transfomer."])


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "1.5", None, True])
def test_the_scale_is_a_finite_number_above_0_known_before_loading(build, value):
    with pytest.raises(UserError, match="scale_factor: .* must be a (finite )?number"):
        build(scale_factor=value, load="no such folder")


def test_training_mode_leaves_the_autoencoder_in_evaluation(build):
    engine = build().train()
    assert engine.model.training and engine.conditioner.training
    assert not engine.first_stage_model.training
    assert not any(module.training for module in engine.first_stage_model.modules())


def test_kept_moments_and_embeddings_give_the_input_of_the_video_to_the_bit(build, video):
    whole, cached = build().train(), build(cached_input=True).train()
    for engine in (whole, cached):
        engine.conditioner.ucg_rates = [0.5]
    kept = {
        "moments": encode_moments(whole.first_stage_model, video),
        "crossattn": whole.conditioner.eval()({"txt": TEXTS})["crossattn"],
    }
    whole.train()
    for seed in range(4):  # some drop the text and some do not
        torch.manual_seed(seed)
        latents, cond = whole.get_input({"mp4": video, "txt": TEXTS})
        after = torch.rand(())
        torch.manual_seed(seed)
        same_latents, same_cond = cached.get_input(kept)
        assert torch.equal(same_latents, latents) and torch.equal(torch.rand(()), after)
        assert torch.equal(same_cond["crossattn"], cond["crossattn"])
        assert not latents.requires_grad and not cond["crossattn"].requires_grad


def test_what_one_sample_becomes_does_not_depend_on_the_others(build, video):
    engine = build().eval()
    moments = encode_moments(engine.first_stage_model, video)
    alone = encode_moments(engine.first_stage_model, video[1:])
    assert torch.equal(moments[1:], alone)
    both = engine.conditioner({"txt": TEXTS})["crossattn"]
    assert torch.equal(both[1:], engine.conditioner({"txt": TEXTS[1:]})["crossattn"])


@pytest.mark.parametrize(("computed_twice", "is_left"), [(0.05, False), (0.5, True)])
def test_a_high_fallback_ratio_switches_to_another_kernel(
    build, kernel_calls, monkeypatch, computed_twice, is_left
):
    runs = "sgm.modules.transformer.attention._runs"
    monkeypatch.setattr(runs, lambda kernel, *_: kernel != "flash")
    shares = []

    def share():
        shares.append(len(kernel_calls))
        return computed_twice

    monkeypatch.setattr("sgm.models.transformer.fallback_ratio", share)
    engine = build().eval()
    cond = engine.conditioner.encode(["a circle"])
    steps = []

    def calls_of_a_video():
        kernel_calls.clear()
        sampled = engine.sample_steps(
            cond,
            engine.conditioner.unconditional(cond),
            (1, 3, 4, 4, 6),
            generator=torch.Generator().manual_seed(1),
        )
        steps.extend(step.step_index for step in sampled)
        return len(kernel_calls)

    num_steps = engine.sampler.num_steps
    for _ in range(2):  # what was found of one video is nothing to the next
        assert calls_of_a_video() == shares[-1] * (1 if is_left else num_steps) > 0
    assert len(shares) == 2
    assert steps == 2 * [*range(num_steps)] != [0, 0]
    engine.model.diffusion_model.set_attention(
        "hopper"
    )  # a kernel that is asked for is always used
    assert calls_of_a_video() == shares[0] * num_steps
    assert len(shares) == 2


def test_with_cached_input_no_file_of_the_encoders_is_read(build, small_model):
    small_model["first_stage_config"]["params"]["ckpt_path"] = "no such file"
    embedder = small_model["conditioner_config"]["params"]["emb_models"][0]
    embedder["params"]["model_dir"] = "no such folder"
    engine = build(cached_input=True)
    assert engine.first_stage_model is None and not list(engine.conditioner.parameters())
    for node in ("first_stage_config", "conditioner_config"):  # so the above does tell
        with pytest.raises(UserError, match="no such"):
            instantiate_from_config(small_model[node])


def test_the_autoencoder_is_there_while_it_is_needed(build, video):
    engine, whole = build(cached_input=True), build()
    with engine.loaded_first_stage():
        assert not any(weight.requires_grad for weight in engine.first_stage_model.parameters())
        engine.first_stage_model.load_state_dict(whole.first_stage_model.state_dict())
        latents = torch.randn(1, 3, 4, 4, 6)
        decoded = list(engine.decode_first_stage(latents))
        gone = weakref.ref(next(engine.first_stage_model.parameters()))
    assert engine.first_stage_model is None and gone() is None
    assert torch.equal(decoded[0], next(whole.decode_first_stage(latents)))
    kept = whole.first_stage_model
    with whole.loaded_first_stage():
        assert whole.first_stage_model is kept
    assert whole.first_stage_model is kept


def test_the_text_encoder_may_be_on_another_device(build):
    engine = build(device="meta")
    engine.load_weights("cpu", text_device="meta")
    (encoder,) = {weight.device.type for weight in engine.conditioner.parameters()}
    assert encoder == "meta" and engine.device.type == "cpu"
