"""The order of the modulation and the attention of a block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sgm.modules.transformer.adaln import AdaLNMixin, JointModulation, Modulation


def make(qk_ln: bool = True) -> AdaLNMixin:
    return AdaLNMixin(2, 8, head_size=4, time_embed_dim=6, qk_ln=qk_ln)


def test_modulation_holds_video_then_text_attention_then_mlp() -> None:
    part = make()
    with torch.no_grad():  # weights are zero, so the result is the bias: 0 … 11, each d times
        part.adaLN_modulations[1][1].bias.copy_(torch.arange(12.0).repeat_interleave(8))
        attention, mlp = part._modulations(1, torch.randn(3, 6), text_length=5)
    found = [
        getattr(modulation, field)
        for modulation in (attention.video, mlp.video, attention.text, mlp.text)
        for field in ("shift", "scale", "gate")
    ]
    for index, value in enumerate(found):
        torch.testing.assert_close(value, torch.full((3, 1, 8), float(index)), rtol=0, atol=0)


def test_text_and_video_are_modulated_apart() -> None:
    def constant(shift: float, scale: float, gate: float) -> Modulation:
        return Modulation(*(torch.full((1, 1, 2), value) for value in (shift, scale, gate)))

    joint = JointModulation(text=constant(1, 2, 3), video=constant(10, 20, 30), text_length=1)
    tokens = torch.full((1, 3, 2), 2.0)
    # text: 2 · (1 + 2) + 1 = 7, video: 2 · (1 + 20) + 10 = 52
    assert joint.modulate(tokens)[0, :, 0].tolist() == [7, 52, 52]
    # with an update of 5, text: 2 + 3 · 5 = 17, video: 2 + 30 · 5 = 152
    update = torch.full((1, 3, 2), 5.0)
    assert joint.add_gated(tokens, update)[0, :, 0].tolist() == [17, 152, 152]


@pytest.mark.parametrize("qk_ln", [True, False])
def test_attention_equals_the_written_out_one(qk_ln: bool) -> None:
    part = make(qk_ln)
    # Small queries and keys, of a variance that the epsilon of their norms matters to.
    query, key, value = (torch.randn(3, 2, 2, 5, 4) * 1e-2).unbind()  # (b, heads, n, head_size)
    if qk_ln:
        with torch.no_grad():
            for norms in (part.query_layernorm_list, part.key_layernorm_list):
                norms[1].weight.copy_(torch.rand(4) + 0.5)
                norms[1].bias.copy_(torch.randn(4))
        query_norm, key_norm = part.query_layernorm_list[1], part.key_layernorm_list[1]
        q = F.layer_norm(query, (4,), query_norm.weight, query_norm.bias, eps=1e-6)
        k = F.layer_norm(key, (4,), key_norm.weight, key_norm.bias, eps=1e-6)
    else:
        q, k = query, key
    expected = torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1) @ value  # sqrt(4) = 2
    mask_that_forbids_everything = torch.zeros(5, 5)
    found = part.attention_fn(query, key, value, mask_that_forbids_everything, None, layer_id=1)
    # Float32 rounding of means of numbers of about 0.01.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
