"""The decoder's norm against the plain way to compute it."""

import pytest
import torch
import torch.nn.functional as F

from sgm.errors import UserError
from sgm.modules.autoencoding.norms import LatentModulatedNorm, group_norm


@pytest.mark.parametrize(("latent_frames", "num_frames"), [(3, 9), (3, 5), (2, 8), (1, 1), (2, 2)])
def test_modulation_matches_latents_stretched_first(latent_frames, num_frames):
    torch.manual_seed(0)
    norm = LatentModulatedNorm(32, latent_channels=4)
    x = torch.randn(2, 32, num_frames, 6, 8) + 1.0
    z = torch.randn(2, 4, latent_frames, 3, 2)
    size = (num_frames, 6, 8)
    if num_frames > 1 and num_frames % 2:
        first = F.interpolate(z[:, :, :1], size=(1, 6, 8))
        rest = F.interpolate(z[:, :, 1:], size=(num_frames - 1, 6, 8))
        stretched = torch.cat([first, rest], dim=2)
    else:
        stretched = F.interpolate(z, size=size)
    normed = F.group_norm(x, 32, norm.norm_layer.weight, norm.norm_layer.bias, eps=1e-6)
    expected = normed * norm.conv_y(stretched) + norm.conv_b(stretched)
    # The two orders differ by float32 rounding of values of a few units.
    torch.testing.assert_close(norm(x, z), expected, atol=5e-6, rtol=0)


def test_width_must_be_a_multiple_of_the_groups():
    with pytest.raises(UserError, match="48 channels.*multiple of 32"):
        group_norm(48)
