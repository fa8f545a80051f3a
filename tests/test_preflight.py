"""Sizes are checked against the model, with the allowed values in the error."""

import inspect

import pytest

from sgm.config import SamplingArgs
from sgm.errors import UserError
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.preflight import T5_EMBEDDER, latent_shape

PARAMS = {"num_frames": 49, "time_compressed_rate": 4, "latent_height": 60, "latent_width": 90}
MODEL = {"network_config": {"params": PARAMS | {"in_channels": 16}}}


def test_the_published_sizes_are_accepted():
    assert latent_shape(SamplingArgs(), MODEL) == (13, 16, 60, 90)
    assert latent_shape(SamplingArgs(sampling_num_frames=1), MODEL) == (1, 16, 60, 90)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampling_num_frames": 49}, r"allows \(video frames in brackets\): 1 \(1\).*13 \(49\)"),
        ({"sampling_num_frames": 12}, "sampling_num_frames=12"),
        ({"sampling_num_frames": 0}, "sampling_num_frames=0"),
        ({"sampling_image_size": [720, 480]}, r"videos of \[480, 720\]"),
        ({"sampling_image_size": [480]}, r"videos of \[480, 720\]"),
        ({"latent_channels": 4}, "in_channels=16"),
    ],
)
def test_other_sizes_are_refused_with_the_allowed_ones(change, words):
    with pytest.raises(UserError, match=words):
        latent_shape(SamplingArgs(**change), MODEL)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({}, "no section 'model'"),
        ({"scale_factor": 1}, "network_config.params is missing"),
        ({"network_config": {"params": PARAMS}}, "params.in_channels is missing;"),
        (
            {"network_config": {"params": PARAMS | {"in_chanels": 16}}},
            r"params.in_channels is missing \(is 'in_chanels' mistyped\?\); it must be",
        ),
        (
            {"network_confg": {}},
            r"params is missing \(is 'network_confg' mistyped\?\) or",
        ),
        ({"network_config": {"parms": {}}}, r"params is missing \(is 'parms' mistyped"),
        ({"network_config": "abc"}, "network_config.params is missing or contains no keys"),
        (
            {"network_config": {"params": [1]}},
            "network_config.params is missing or contains no keys",
        ),
    ],
)
def test_an_incomplete_model_section_is_named(model, words):
    with pytest.raises(UserError, match=words):
        latent_shape(SamplingArgs(), model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("time_compressed_rate", 0),
        ("time_compressed_rate", "four"),
        ("time_compressed_rate", None),
        ("num_frames", -9),
        ("num_frames", 4.5),
        ("latent_height", True),
        ("in_channels", "16"),
    ],
)
def test_a_size_of_the_model_that_is_no_size_is_named(key, value):
    params = PARAMS | {"in_channels": 16, key: value}
    with pytest.raises(UserError, match=f"{key}: {value!r} must be a whole number"):
        latent_shape(SamplingArgs(), {"network_config": {"params": params}})


def with_texts(length, text_length):
    """A `model` section: the length of T5's texts, and the one that its network takes."""
    embedder = {"target": T5_EMBEDDER, "params": {"max_length": length} if length else {}}
    modules = {"pos_embed_config": {"params": {"text_length": text_length}}}
    return {
        "network_config": {"params": PARAMS | {"in_channels": 16, "modules": modules}},
        "conditioner_config": {"params": {"emb_models": [embedder]}},
    }


@pytest.mark.parametrize("length", [226, None])
def test_a_length_of_texts_that_the_network_was_made_for_passes(length):
    assert latent_shape(SamplingArgs(), with_texts(length, 226)) == (13, 16, 60, 90)


def test_a_length_of_texts_that_the_network_was_not_made_for_is_named():
    default = inspect.signature(FrozenT5Embedder).parameters["max_length"].default
    with pytest.raises(UserError, match=f"max_length: {default} must be 32"):
        latent_shape(SamplingArgs(), with_texts(None, 32))
    with pytest.raises(UserError, match=r"\[0\].params.max_length: 128 must be 226, the text_"):
        latent_shape(SamplingArgs(), with_texts(128, 226))


def test_frames_in_the_message_follow_the_models_rate():
    params = PARAMS | {"in_channels": 16, "time_compressed_rate": 8}
    with pytest.raises(UserError, match=r"1 \(1\), 3 \(17\), 5 \(33\), 7 \(49\)$"):
        latent_shape(SamplingArgs(), {"network_config": {"params": params}})
