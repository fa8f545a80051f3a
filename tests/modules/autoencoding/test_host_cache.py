"""Frames that convolutions keep on the host between chunks."""

import torch

from sgm.modules.autoencoding import causal_conv
from sgm.modules.autoencoding.causal_conv import CausalConv3d, ConvCache, HostConvCache


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
    # Here nothing but a meta device is not the host; copies from it are told by their value.
    monkeypatch.setattr(causal_conv, "host_copy", lambda frames: torch.full_like(frames, 7))
    conv = CausalConv3d(3, 4, kernel_size=3)
    cache = HostConvCache(torch.device("meta"))
    assert cache.recall(conv) is None
    cache.fill(conv, torch.rand(1, 3, 4, 5, 6))
    assert (cache._frames[conv] == 7).all()
    assert cache.recall(conv).device.type == "meta" and cache.recall(conv).shape[2] == 2
