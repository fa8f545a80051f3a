"""The diffusion transformer: goldens, clips, types, gradients, LoRA and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sgm.errors import UserError
from sgm.models.transformer import DiffusionTransformer, sinusoidal_embedding
from sgm.modules.transformer import adaln
from sgm.modules.transformer.adaln import CheckpointingPolicy
from sgm.util import instantiate_from_config

TABLE = "mixins.pos_embed.pos_embedding"

# Goldens are float32 on CPU: a right implementation differs from them by rounding only, measured
# 4e-6 on values up to 5; a wrong epsilon of one norm already shows above 2e-5.
GOLDEN_TOLERANCE = {"rtol": 0, "atol": 2e-5}

Config = Callable[..., dict[str, Any]]
Golden = Callable[[str], dict[str, Tensor]]


def weights_of(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a golden file in float32, without its position table."""
    weights = {
        name.removeprefix("weight."): tensor.float()
        for name, tensor in golden.items()
        if name.startswith("weight.")
    }
    del weights[TABLE]  # the computed table is what is to be checked
    return weights


def load_weights(model: DiffusionTransformer, golden: dict[str, Tensor]) -> None:
    """Fill the model; only the position table may be absent, and nothing may be left over."""
    missing, unexpected = model.load_state_dict(weights_of(golden), strict=False)
    assert (missing, unexpected) == ([TABLE], [])


def predict(model: DiffusionTransformer, golden: dict[str, Tensor], suffix: str = "") -> Tensor:
    """The prediction for a golden's inputs."""
    with torch.no_grad():
        return model(
            golden[f"in.x{suffix}"], timesteps=golden["in.timesteps"], context=golden["in.context"]
        )


def inputs(model: DiffusionTransformer, num_frames: int = 3) -> dict[str, Tensor]:
    """Random inputs of a batch of two for the small model."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, num_frames, *model.frame_shape, generator=generator),
        "timesteps": torch.tensor([999, 3]),
        "context": torch.randn(2, 10, 48, generator=generator),
    }


# ---- goldens ----


def test_prediction_and_table_equal_golden(small_config: Config, golden: Golden) -> None:
    expected = golden("dit_2b_small")
    model = DiffusionTransformer(**small_config(width_interpolation=1.25))
    load_weights(model, expected)
    # The table is computed in float64; the stored one was rounded to float32 once more.
    torch.testing.assert_close(
        model.state_dict()[TABLE], expected[f"weight.{TABLE}"], rtol=0, atol=5e-7
    )
    torch.testing.assert_close(predict(model, expected), expected["out.y"], **GOLDEN_TOLERANCE)


def test_one_frame_equals_golden(small_config: Config, golden: Golden) -> None:
    expected = golden("dit_2b_small")
    model = DiffusionTransformer(**small_config(width_interpolation=1.25))
    load_weights(model, expected)
    prediction = predict(model, expected, "_image")
    torch.testing.assert_close(prediction, expected["out.y_image"], **GOLDEN_TOLERANCE)


def test_lora_equals_golden(small_config: Config, golden: Golden) -> None:
    expected = golden("dit_2b_lora")
    model = DiffusionTransformer(**small_config(num_layers=1, lora={"r": 4}))
    load_weights(model, expected)
    torch.testing.assert_close(predict(model, expected), expected["out.y"], **GOLDEN_TOLERANCE)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".matrix_B." in name:
                parameter.zero_()
    prediction = predict(model, expected)
    torch.testing.assert_close(prediction, expected["out.y_without_lora"], **GOLDEN_TOLERANCE)


# ---- clips and types ----


def test_shorter_clip_uses_first_positions(
    small_config: Config, randomize: Callable[..., None]
) -> None:
    model = DiffusionTransformer(**small_config())
    short = DiffusionTransformer(**small_config(num_frames=5))
    randomize(model)
    randomize(short)
    clip = inputs(model, num_frames=2)
    with torch.no_grad():
        torch.testing.assert_close(model(**clip), short(**clip), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_cpu(
    small_config: Config, randomize: Callable[..., None], dtype: torch.dtype
) -> None:
    reference = DiffusionTransformer(**small_config())
    randomize(reference)
    model = DiffusionTransformer(**small_config(), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        expected, prediction = reference(**inputs(model)), model(**inputs(model))
    assert prediction.dtype == torch.float32  # that of x, since samplers step in float32
    # A few roundings of 2^-8 (bfloat16) or 2^-11 add up along two blocks.
    relative = (prediction - expected).norm() / expected.norm()
    assert relative < {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def test_parts_without_weights_of_norms(
    small_config: Config, randomize: Callable[..., None]
) -> None:
    config = small_config(elementwise_affine=False)
    config["modules"]["adaln_layer_config"]["params"]["qk_ln"] = False
    model = DiffusionTransformer(**config)
    randomize(model)
    assert not [name for name, _ in model.named_parameters() if "norm" in name]
    with torch.no_grad():
        assert model(**inputs(model)).std() > 0


def test_fresh_model_predicts_zeros(small_config: Config) -> None:
    model = DiffusionTransformer(**small_config())
    with torch.no_grad():
        assert not model(**inputs(model)).any()


def test_sinusoidal_embedding_by_hand() -> None:
    # width 4: frequencies 1 and exp(-ln 10000 / 2) = 0.01
    embedding = sinusoidal_embedding(torch.tensor([0, 50]), 4)
    by_hand = torch.tensor([[1, 1, 0, 0], [0.964966, 0.877583, -0.262375, 0.479426]])
    torch.testing.assert_close(embedding, by_hand, rtol=0, atol=1e-5)  # by hand: six digits


# ---- training ----


def gradients(model: DiffusionTransformer) -> dict[str, Tensor]:
    """Gradients of a scalar that depends on every output value in another way."""
    model.train()
    model.zero_grad()
    prediction = model(**inputs(model))
    (
        prediction * torch.linspace(-1, 1, prediction.numel()).reshape(prediction.shape)
    ).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trained_model(
    config: dict[str, Any], randomize: Callable[..., None], *, lora: bool
) -> DiffusionTransformer:
    """A model with noise for weights; in LoRA training nothing before the blocks has a gradient."""
    model = DiffusionTransformer(**config)
    randomize(model)
    if lora:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".matrix_" in name)
    return model


@pytest.mark.parametrize("policy", ["block", "attention"])
@pytest.mark.parametrize("lora", [None, {"r": 4, "lora_dropout": 0.3}])
def test_checkpointing_gives_the_same_gradients(
    small_config: Config,
    randomize: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    lora: dict[str, Any] | None,
    policy: CheckpointingPolicy,
) -> None:
    kept = []
    original = adaln.run_checkpointed

    def counting(*args: Any, policy: CheckpointingPolicy) -> Any:
        kept.append(policy)
        return original(*args, policy=policy)

    monkeypatch.setattr(adaln, "run_checkpointed", counting)
    model = trained_model(small_config(lora=lora), randomize, lora=lora is not None)
    found = {}
    for setting in (None, policy):
        model.set_checkpointing(setting)
        torch.manual_seed(0)  # of the dropout
        found[setting] = gradients(model)
    assert kept == [policy] * 2  # the layers
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found[policy].keys() == found[None].keys() == trainable
    for name, gradient in found[None].items():
        assert gradient.any(), name
        # The same operations on the same numbers.
        torch.testing.assert_close(found[policy][name], gradient, rtol=0, atol=0, msg=name)

    with torch.no_grad():
        model(**inputs(model))
    assert len(kept) == 2  # nothing is recomputed where no gradient is asked for


def test_configuration_turns_checkpointing_on(small_config: Config) -> None:
    found = [
        DiffusionTransformer(
            **small_config(transformer_args={"checkpoint_activations": enabled})
        ).checkpointing
        for enabled in (False, True)
    ]
    assert found == [None, "block"]


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_compiled_blocks_are_one_graph_of_all_layers(
    small_config: Config,
    randomize: Callable[..., None],
    compiled_graphs: dict[str, int],
    lora: dict[str, Any] | None,
) -> None:
    model = trained_model(small_config(lora=lora, num_layers=3), randomize, lora=lora is not None)
    model.set_checkpointing("attention")
    expected = gradients(model)
    model.compile_blocks()
    found = gradients(model)
    assert compiled_graphs["unique_graphs"] == 1
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Sums in another order, of numbers up to 60.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_tuning_is_left_out_where_norms_are_trained(
    small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, *, dynamic, options: tuned.append(options["coordinate_descent_tuning"]),
    )
    model = DiffusionTransformer(**small_config(lora={"r": 4}))
    model.compile_blocks(tune=True)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".matrix_" in name)
    model.compile_blocks(tune=True)
    model.compile_blocks()
    assert tuned == [False, True, False]


# ---- branches of guidance ----


@pytest.mark.parametrize("kernel", ["hopper", "flash", "sdpa"])
@pytest.mark.parametrize("num_branches", [2, 3])
def test_branches_of_guidance_are_as_if_each_were_alone(
    small_config: Config,
    randomize: Callable[..., None],
    kernel_calls: list[tuple[int, int, int]],
    num_branches: int,
    kernel: str,
) -> None:
    model = DiffusionTransformer(**small_config())
    randomize(model)
    model.double().set_attention(kernel)
    given = inputs(model)
    clips = {"x": given["x"].double(), "timesteps": given["timesteps"]}
    texts = torch.randn(2 * num_branches, 10, 48, dtype=torch.float64)
    with torch.no_grad():
        found = model(**clips, context=texts)
        of_all = kernel_calls.copy()
        expected = torch.cat([model(**clips, context=text) for text in texts.chunk(num_branches)])
    # The attention of the first block is put together from parts.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    num_video, batch = 3 * 4 * 6, 2 * num_branches
    first_block = [
        (batch, num_video, 10),  # the video to each text
        (2, num_video, num_video),  # among itself, once for each clip
        (2, num_branches * 10, num_video),
        (batch, 10, 10),
    ]
    second_block = (batch, 10 + num_video, 10 + num_video)
    assert sorted(of_all) == (sorted([*first_block, second_block]) if kernel != "sdpa" else [])


@pytest.mark.usefixtures("kernel_calls")
def test_gradients_of_branches_are_those_of_copies_of_the_clips(
    small_config: Config, randomize: Callable[..., None]
) -> None:
    model = DiffusionTransformer(**small_config())
    randomize(model)
    model.double().set_attention("flash")
    given = inputs(model)
    texts = torch.randn(4, 10, 48, dtype=torch.float64)
    found = []
    for copies in (1, 2):
        model.zero_grad()
        clips = {
            "x": torch.cat([given["x"].double()] * copies),
            "timesteps": given["timesteps"].repeat(copies),
        }
        model(**clips, context=texts).square().mean().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.usefixtures("kernel_calls")
@pytest.mark.parametrize("kernel", ["hopper", "flash"])
def test_first_block_of_branches_compiles_to_one_graph(
    small_config: Config,
    randomize: Callable[..., None],
    compiled_graphs: dict[str, int],
    kernel: str,
) -> None:
    model = DiffusionTransformer(**small_config(num_layers=3))
    randomize(model)
    model.set_attention(kernel)
    clips = inputs(model)
    clips["context"] = torch.randn(4, 10, 48)
    with torch.no_grad():
        expected = model(**clips)
        model.compile_blocks()
        found = model(**clips)
    assert compiled_graphs["unique_graphs"] == 2  # it, and that of the other two
    # Sums in another order, of numbers up to 5.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


# ---- LoRA ----


def test_lora_on_meta_waits_for_the_weights(small_config: Config, golden: Golden) -> None:
    expected = golden("dit_2b_lora")
    weights = weights_of(expected)
    base = {n.replace(".original.", "."): w for n, w in weights.items() if ".matrix_" not in n}
    with torch.device("meta"):
        model = DiffusionTransformer(**small_config(num_layers=1, lora={"r": 4}))
    with pytest.raises(RuntimeError, match="have no values"):
        model.add_lora()
    base[TABLE] = model.mixins["pos_embed"].compute_table()
    model.load_state_dict(base, assign=True)

    model.add_lora()
    prediction = predict(model, expected)  # matrix_B starts at zero
    torch.testing.assert_close(prediction, expected["out.y_without_lora"], **GOLDEN_TOLERANCE)

    model.load_state_dict({n: w for n, w in weights.items() if ".matrix_" in n}, strict=False)
    model.add_lora()  # a second time changes nothing
    torch.testing.assert_close(predict(model, expected), expected["out.y"], **GOLDEN_TOLERANCE)


def test_lora_alpha_scales_the_update(small_config: Config, golden: Golden) -> None:
    # alpha / r · B A x: alpha 2 with B halved is alpha 1.
    expected = golden("dit_2b_lora")
    model = DiffusionTransformer(**small_config(num_layers=1, lora={"r": 4, "lora_alpha": 2}))
    load_weights(model, expected)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".matrix_B." in name:
                parameter.mul_(0.5)
    torch.testing.assert_close(predict(model, expected), expected["out.y"], **GOLDEN_TOLERANCE)


def test_lora_only_in_layer_range(small_config: Config, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="sat"):
        model = DiffusionTransformer(**small_config(lora={"r": 4, "layer_range": [1]}))
    names = [name for name in model.state_dict() if ".matrix_" in name]
    assert len(names) == 8
    assert all(name.startswith("transformer.layers.1.attention.") for name in names)
    assert not caplog.records  # SAT's line for every layer is held back


# ---- errors ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size=64 is not a multiple of num_attention_heads=3"),
        ({"hidden_size": 40}, "hidden_size=40: the 3D position table needs a multiple of 16"),
        ({"latent_height": 7}, "latent_height=7 is not a multiple of patch_size=2"),
        ({"latent_width": 11}, "latent_width=11 is not a multiple of patch_size=2"),
        (
            {"num_frames": 10},
            r"num_frames=10: it must be 1 \+ a multiple of time_compressed_rate=4",
        ),
        ({"num_layers": 0}, "num_layers=0"),
        ({"transformer_args": {"checkpoint_activation": True}}, "'checkpoint_activations'"),
        (
            {"transformer_args": {"layernorm_order": "post"}},
            "transformer_args.layernorm_order: 'post' must be 'pre'",
        ),
        ({"transformer_args": {"model_parallel_size": 2}}, "model_parallel_size: 2 must be 1"),
        (
            {"lora": {"rank": 4}},
            "lora_config: r is missing; it must be a whole number of at least 1",
        ),
        (
            {"lora": {"r": 4, "lora_alpha": math.nan}},
            "lora_config: lora_alpha: nan must be a finite number",
        ),
        (
            {"lora": {"r": 4, "lora_dropout": 2}},
            "lora_config: lora_dropout: 2 must be a number from 0 to 1",
        ),
        (
            {"lora": {"r": 4, "layer_range": [0, 2]}},
            "layer_range contains layer 2, but the model has 2 layers",
        ),
    ],
)
def test_sizes_and_keys_that_do_not_fit(
    small_config: Config, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        DiffusionTransformer(**small_config(**changes))


def test_unknown_and_absent_nodes(small_config: Config) -> None:
    config = small_config()
    config["modules"]["lora_confg"] = {"target": "sat.model.finetune.lora2.LoraMixin"}
    with pytest.raises(UserError, match="'lora_confg' in modules; did you mean 'lora_config'"):
        DiffusionTransformer(**config)
    config = small_config()
    del config["modules"]["final_layer_config"]
    with pytest.raises(UserError, match="modules.final_layer_config is missing"):
        DiffusionTransformer(**config)


def test_unknown_param_of_the_model_names_the_nearest(small_config: Config) -> None:
    target = "sgm.models.transformer.DiffusionTransformer"
    with pytest.raises(UserError, match="'latent_heigth'.*did you mean 'latent_height'"):
        instantiate_from_config({"target": target, "params": small_config(latent_heigth=8)})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 3, 16, 6, 12), r"takes \(b, t, 16, 8, 12\) with t from 1 to 3"),
        ("x", torch.zeros(2, 4, 16, 8, 12), "with t from 1 to 3"),
        ("x", torch.zeros(2, 3, 4, 8, 12), r"\(b, t, 16, 8, 12\)"),
        ("x", torch.zeros(0, 3, 16, 8, 12), r"\(b, t, 16, 8, 12\)"),
        ("context", torch.zeros(2, 9, 48), r"takes .*\(k \* b, 10, 48\)"),
        ("context", torch.zeros(1, 10, 48), r"takes .*\(k \* b, 10, 48\)"),
        ("context", torch.zeros(0, 10, 48), r"takes .*\(k \* b, 10, 48\)"),
        ("context", torch.zeros(3, 10, 48), r"takes .*\(k \* b, 10, 48\)"),
        ("timesteps", torch.zeros(1, dtype=torch.int64), r"timesteps of shape \(1,\)"),
    ],
)
def test_inputs_of_another_size(
    small_config: Config, name: str, value: Tensor, message: str
) -> None:
    model = DiffusionTransformer(**small_config())
    with pytest.raises(UserError, match=message):
        model(**{**inputs(model), name: value})
