"""The autoencoder against the independent one of diffusers, with the same random weights."""

import pytest
import torch

from sgm.checkpoint.table import to_diffusers
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper

diffusers = pytest.importorskip("diffusers")

# Another code base, another order of the same sums through some thirty layers in float32.
TOLERANCE = 1e-4

LEVELS = 4


@pytest.fixture(scope="module")
def pair():
    """Ours and theirs, of the same weights; ch_mult differs per level to catch mixed-up widths."""
    torch.manual_seed(0)
    widths = {"ch": 32, "ch_mult": [1, 2, 2, 3], "num_res_blocks": 2, "z_channels": 5}
    part = "sgm.modules.autoencoding"
    ours = VideoAutoencoderInferenceWrapper(
        {"target": f"{part}.encoder.ContextParallelEncoder3D", "params": widths},
        {"target": f"{part}.decoder.ContextParallelDecoder3D", "params": widths},
        regularizer_config={"target": f"{part}.regularizers.DiagonalGaussianRegularizer"},
    )
    theirs = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(32, 64, 64, 96),
        layers_per_block=2,
        latent_channels=5,
        temporal_compression_ratio=4,
        down_block_types=("CogVideoXDownBlock3D",) * LEVELS,
        up_block_types=("CogVideoXUpBlock3D",) * LEVELS,
        sample_height=32,
        sample_width=48,
    )
    for name, parameter in ours.named_parameters():
        if "norm" in name:  # away from ones and zeros, so that each of them matters
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    theirs.load_state_dict(dict(to_diffusers(ours.state_dict(), "vae", where="ours")))
    return ours.eval().requires_grad_(False), theirs.eval().requires_grad_(False)


@pytest.mark.parametrize("num_frames", [1, 9])
def test_encode(pair, num_frames):
    ours, theirs = pair
    x = torch.rand(1, 3, num_frames, 32, 48) * 2 - 1
    expected = theirs.encode(x).latent_dist.parameters
    moments, _ = ours.encode(x, unregularized=True)
    torch.testing.assert_close(moments, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_latent_frames", [1, 3, 7])
def test_streamed_decode(pair, num_latent_frames):
    ours, theirs = pair
    z = torch.randn(1, 5, num_latent_frames, 4, 6)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, atol=TOLERANCE, rtol=0)
