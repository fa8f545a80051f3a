"""What the network is conditioned on: embedders from a configuration, dropped in training."""

import logging
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from sgm import util
from sgm.errors import UserError
from sgm.modules import GeneralConditioner


class CountingEmbedder(nn.Module):
    """Embeds a text as ones, (b, 3, width)."""

    def __init__(self, width, *, dtype, device):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype, device=device))
        self.dropout = nn.Dropout(0.5)

    def forward(self, texts):
        return self.dropout(self.weight.expand(len(texts), 3, -1))


@pytest.fixture
def node(monkeypatch):
    """Makes the node of a stand-in embedder, which targets may name during the test."""
    module = ModuleType("stand_in")
    module.CountingEmbedder = CountingEmbedder
    monkeypatch.setattr(CountingEmbedder, "__module__", "stand_in")
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setattr(util, "_allowed_prefixes", [*util._allowed_prefixes, "stand_in"])

    def make(width=4, **keys):
        return {"target": "stand_in.CountingEmbedder", "params": {"width": width}, **keys}

    return make


def test_only_a_trainable_embedder_is_trained(node):
    conditioner = GeneralConditioner([node(is_trainable=True), node(is_trainable=False), node()])
    conditioner.train()
    assert [e.weight.requires_grad for e in conditioner.embedders] == [True, False, False]
    # One that is not trained embeds as in inference: without dropout.
    assert [e.dropout.training for e in conditioner.embedders] == [True, False, False]
    conditioner.eval()
    assert not any(e.dropout.training for e in conditioner.embedders)


def test_embeddings_are_joined_along_their_width_each_from_its_own_entry(node):
    conditioner = GeneralConditioner([node(2), node(5, input_key="caption")]).eval()
    cond = conditioner({"txt": ["a", "b"], "caption": ["c", "d"], "mp4": None})
    assert list(cond) == ["crossattn"] and cond["crossattn"].shape == (2, 3, 7)


@pytest.mark.parametrize("with_embedders", [True, False])
def test_no_embedder_at_all_is_refused(with_embedders):
    with pytest.raises(UserError, match="emb_models is empty; add a text encoder"):
        GeneralConditioner([], with_embedders=with_embedders)


def test_dtype_reaches_the_embedders(node):
    conditioner = GeneralConditioner([node()], dtype=torch.bfloat16).eval()
    assert conditioner({"txt": ["a"]})["crossattn"].dtype == torch.bfloat16


def test_training_drops_whole_embeddings_at_the_rate_and_inference_none(node):
    conditioner = GeneralConditioner([node(ucg_rate=0.25)])
    batch = {"txt": ["a"] * 2000}
    torch.manual_seed(0)
    kept = conditioner.train()(batch)["crossattn"]
    is_zero = (kept == 0).flatten(1)
    assert torch.equal(is_zero.all(1), is_zero.any(1))  # a sample as a whole, never a part
    # The standard deviation of the share is sqrt(0.25 * 0.75 / 2000) = 0.0097; this is 4 of them.
    assert abs(is_zero.all(1).float().mean().item() - 0.25) < 0.04
    assert torch.equal(kept[~is_zero.all(1)].unique(), torch.ones(1))  # the rest is as it was
    assert (conditioner.eval()(batch)["crossattn"] == 1).all()


def test_a_kept_embedding_is_dropped_as_a_fresh_one_is_without_any_embedder(node):
    nodes = [node(ucg_rate=0.5)]
    fresh, kept = GeneralConditioner(nodes), GeneralConditioner(nodes, with_embedders=False)
    assert not list(kept.parameters())
    texts = ["a"] * 64
    torch.manual_seed(3)
    expected = fresh.train()({"txt": texts})["crossattn"]
    torch.manual_seed(3)
    found = kept.train()({"crossattn": torch.ones(64, 3, 4)})["crossattn"]
    assert torch.equal(found, expected) and 0 < found.sum() < found.numel()
    assert (kept.eval()({"crossattn": torch.ones(64, 3, 4)})["crossattn"] == 1).all()


def test_without_embedders_there_are_no_texts(node):
    with pytest.raises(RuntimeError, match="batches need 'crossattn'"):
        GeneralConditioner([node()], with_embedders=False)({"txt": ["a"]})


@pytest.mark.parametrize("streamed", [False, True])
def test_an_embedder_with_a_forward_only_is_enough(node, streamed):
    conditioner = GeneralConditioner([node(is_trainable=True), node()], device="meta").eval()
    conditioner.load_weights("cpu", streamed=streamed)  # builds both again
    assert not any(e.dropout.training for e in conditioner.embedders)
    cond = conditioner.encode(["a", "b"])["crossattn"]
    assert torch.equal(cond, torch.ones(2, 3, 8))
    assert [e.weight.requires_grad for e in conditioner.embedders] == [True, False]


def test_without_a_rate_nothing_is_dropped_in_training(node):
    conditioner = GeneralConditioner([node()]).train()
    assert (conditioner({"txt": ["a"] * 100})["crossattn"] == 1).all()


def test_an_unknown_key_gets_the_nearest_name(node):
    with pytest.raises(UserError, match="unknown key 'ucg_rat' in emb_models.*'ucg_rate'"):
        GeneralConditioner([node(ucg_rat=0.1)])


@pytest.mark.parametrize("rate", [-0.1, 3, True, "0.1"])
def test_a_rate_is_from_0_to_1(node, rate):
    with pytest.raises(UserError, match="ucg_rate=.* from 0 to 1"):
        GeneralConditioner([node(ucg_rate=rate)])


def test_an_embedder_without_target_is_refused():
    with pytest.raises(UserError, match="target None"):
        GeneralConditioner([{"input_key": "txt"}])


def test_the_unconditional_counterpart_is_zeros_of_the_same_kind():
    cond = {"crossattn": torch.ones(2, 3, 4, dtype=torch.float16)}
    uncond = GeneralConditioner.unconditional(cond)["crossattn"]
    assert uncond.shape == (2, 3, 4) and uncond.dtype == torch.float16 and not uncond.any()


@pytest.fixture
def t5_node(t5_folder):
    return {
        "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
        "params": {"model_dir": str(t5_folder), "max_length": 16},
    }


def test_encode_warns_about_a_cut_text_only_and_keeps_no_gradient(t5_node, caplog):
    conditioner = GeneralConditioner([{**t5_node, "is_trainable": True}]).eval()
    with caplog.at_level(logging.WARNING, logger="sgm"):
        cond = conditioner.encode(["a red circle"])
        assert not caplog.records
        conditioner.encode(["a", "a red circle moving left on a zebra"])
    (record,) = caplog.records
    assert "longer than 16 tokens" in record.getMessage() and "zebra'" in record.getMessage()
    assert cond["crossattn"].shape == (1, 16, 64) and not cond["crossattn"].requires_grad


def test_the_gradient_reaches_a_trainable_text_encoder(t5_node):
    conditioner = GeneralConditioner([{**t5_node, "is_trainable": True}]).train()
    conditioner({"txt": ["a red circle"]})["crossattn"].sum().backward()
    shared = conditioner.embedders[0].transformer.shared.weight
    assert shared.grad is not None and shared.grad.any()
