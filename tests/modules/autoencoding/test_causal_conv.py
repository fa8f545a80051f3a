"""Causal convolution, its caches, and the limits that `convolve` works around."""

import pytest
import torch
import torch.nn.functional as F

from sgm.modules.autoencoding import causal_conv
from sgm.modules.autoencoding import convolve as convolve_module
from sgm.modules.autoencoding.causal_conv import CausalConv3d, ConvCache, HostConvCache
from sgm.modules.autoencoding.convolve import convolve

# Sums of about a hundred products of numbers near 1, in two orders: float32 rounding.
ROUNDING = 1e-5


@pytest.fixture
def conv() -> CausalConv3d:
    torch.manual_seed(0)
    return CausalConv3d(3, 4, kernel_size=3)


def padded_by_hand(conv: CausalConv3d, x: torch.Tensor) -> torch.Tensor:
    """The definition: two copies of the first frame in front, zeros around each frame."""
    x = torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2)
    return F.conv3d(F.pad(x, (1, 1, 1, 1)), conv.conv.weight, conv.conv.bias)


def test_matches_its_definition(conv):
    x = torch.randn(2, 3, 5, 6, 7)
    torch.testing.assert_close(conv(x), padded_by_hand(conv, x), atol=ROUNDING, rtol=0)


def test_float64_takes_the_other_kernel_with_the_same_result(conv):
    x = torch.randn(2, 3, 5, 6, 7)
    single = conv(x)
    double = conv.double()(x.double())
    torch.testing.assert_close(double.float(), single, atol=ROUNDING, rtol=0)


def test_output_frame_depends_on_no_later_input(conv):
    x = torch.randn(1, 3, 6, 4, 4)
    changed = x.clone()
    changed[:, :, 4:] += 1.0
    difference = (conv(x) - conv(changed)).abs().amax(dim=(0, 1, 3, 4))
    assert torch.equal(difference[:4], torch.zeros(4))
    assert (difference[4:] > 0).all()


@pytest.mark.parametrize("chunks", [(3, 2, 2), (1, 6), (1, 1, 5), (6, 1)])
def test_chunks_with_a_cache_equal_the_whole(conv, chunks):
    x = torch.randn(1, 3, 7, 4, 5)
    with ConvCache() as cache:
        parts = [conv(chunk, cache=cache) for chunk in x.split(chunks, dim=2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), conv(x), atol=ROUNDING, rtol=0)


def test_cache_holds_copies_and_is_empty_after_the_block(conv):
    x = torch.randn(1, 3, 9, 4, 4)
    with pytest.raises(RuntimeError, match="stop"), ConvCache() as cache:
        conv(x, cache=cache)
        kept = cache.recall(conv)
        assert torch.equal(kept, x[:, :, -2:])
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
        raise RuntimeError("stop")
    assert len(cache) == 0


def test_cache_keeps_one_entry_a_convolution_and_none_for_single_pixel_kernels(conv):
    pixelwise = CausalConv3d(3, 4, kernel_size=1)
    with ConvCache() as cache:
        for _ in range(2):
            conv(torch.randn(1, 3, 2, 4, 4), cache=cache)
            pixelwise(torch.randn(1, 3, 2, 4, 4), cache=cache)
        assert len(cache) == 1


def test_gradients_flow_through_the_cache(conv):
    x = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    with ConvCache() as cache:
        conv(x[:, :, :2], cache=cache)
        conv(x[:, :, 2:], cache=cache).sum().backward()
    assert (x.grad[:, :, :2] != 0).any()


@pytest.mark.parametrize("limit", [1, 2 * 4 * 30 * 3])  # the least step there is; three frames
def test_inputs_beyond_the_limit_are_convolved_in_parts(conv, monkeypatch, limit):
    x = torch.randn(2, 3, 8, 6, 5)
    whole = conv(x)
    calls = []
    run = convolve_module._convolve_frames

    def counted(frames, *args, **kwargs):
        calls.append(frames.shape[2])
        return run(frames, *args, **kwargs)

    monkeypatch.setattr(convolve_module, "MAX_ELEMENTS_PER_CALL", limit)
    monkeypatch.setattr(convolve_module, "_convolve_frames", counted)
    torch.testing.assert_close(conv(x), whole, atol=ROUNDING, rtol=0)
    assert len(calls) > 1
    assert max(calls) <= 3 + 2  # frames, and what precedes them


def test_parts_of_a_strided_convolution_without_a_head(monkeypatch):
    x, weight, bias = torch.randn(1, 2, 5, 9, 9), torch.randn(4, 2, 1, 3, 3), torch.randn(4)
    monkeypatch.setattr(convolve_module, "MAX_ELEMENTS_PER_CALL", 1)
    expected = F.conv3d(x, weight, bias, stride=(1, 2, 2))
    actual = convolve(x, weight, bias=bias, stride=2)
    torch.testing.assert_close(actual, expected, atol=ROUNDING, rtol=0)


@torch.no_grad()
def test_chunks_are_convolved_as_with_frames_on_the_device():
    torch.manual_seed(0)
    conv, video = CausalConv3d(3, 4, kernel_size=3), torch.rand(1, 3, 7, 5, 6)
    results = []
    for cache in (ConvCache(), HostConvCache(torch.device("cpu"))):
        with cache:
            chunks = [conv(chunk, cache=cache) for chunk in video.split([3, 2, 2], dim=2)]
            assert len(cache) == 1
        assert len(cache) == 0
        results.append(torch.cat(chunks, dim=2))
    assert torch.equal(*results)


@torch.no_grad()
def test_what_is_kept_goes_to_the_host_and_comes_back_to_the_device(monkeypatch):
    # The device is "meta", so that a copy on the host is recognised by its value.
    monkeypatch.setattr(causal_conv, "host_copy", lambda frames: torch.full_like(frames, 7))
    conv = CausalConv3d(3, 4, kernel_size=3)
    cache = HostConvCache(torch.device("meta"))
    assert cache.recall(conv) is None
    cache.fill(conv, torch.rand(1, 3, 4, 5, 6))
    assert (cache._frames[conv] == 7).all()
    assert cache.recall(conv).device.type == "meta" and cache.recall(conv).shape[2] == 2
