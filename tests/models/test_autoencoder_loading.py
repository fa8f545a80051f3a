"""Weights from a file: taken as they are, or refused with a sentence."""

import pytest
import torch

from sgm.errors import UserError
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper

REGULARIZER = {"target": "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"}


def build(z_channels: int = 4, **params: object) -> VideoAutoencoderInferenceWrapper:
    widths = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": z_channels}
    part = "sgm.modules.autoencoding"
    return VideoAutoencoderInferenceWrapper(
        {"target": f"{part}.encoder.ContextParallelEncoder3D", "params": widths},
        {"target": f"{part}.decoder.ContextParallelDecoder3D", "params": widths},
        regularizer_config=REGULARIZER,
        **params,
    )


@pytest.fixture
def saved(tmp_path):
    """A file in the published layout, and the weights in it."""
    torch.manual_seed(0)
    weights = build().state_dict()
    path = tmp_path / "3d-vae.pt"
    extra = {"loss.discriminator.weight": torch.zeros(3)}
    torch.save({"state_dict": {**weights, **extra}}, path)
    return path, weights


def test_weights_are_those_of_the_file(saved):
    path, weights = saved
    loaded = build(ckpt_path=str(path), ignore_keys=["loss"]).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@torch.no_grad()
def test_loaded_autoencoder_runs_and_can_be_trained(saved):
    vae = build(ckpt_path=str(saved[0]), ignore_keys=["loss"])
    assert vae.decode(torch.zeros(1, 4, 3, 2, 2)).shape == (1, 3, 5, 4, 4)
    assert all(p.requires_grad and not p.is_meta for p in vae.parameters())


def test_half_precision_files_are_loaded_in_the_default_dtype(saved):
    path, weights = saved
    torch.save({"state_dict": {name: value.half() for name, value in weights.items()}}, path)
    vae = build(ckpt_path=str(path))
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}


def test_missing_and_unexpected_keys_are_named(saved):
    path, weights = saved
    bias = weights.pop("decoder.conv_in.conv.bias")
    torch.save({"state_dict": {**weights, "decoder.conv_first.bias": bias}}, path)
    with pytest.raises(UserError) as error:
        build(ckpt_path=str(path))
    message = str(error.value)
    assert "1 missing (decoder.conv_in.conv.bias)" in message
    assert "1 unknown (decoder.conv_first.bias)" in message
    assert str(path) in message


def test_both_shapes_are_named_and_long_lists_are_cut(saved):
    with pytest.raises(UserError) as error:
        build(z_channels=8, ckpt_path=str(saved[0]), ignore_keys=["loss"])
    message = str(error.value)
    assert (
        "encoder.conv_out.conv.weight is [8, 32, 3, 3, 3] in the file, [16, 32, 3, 3, 3] in"
        in message
    )
    assert message.count("in the file") == 3
    assert "…" in message
