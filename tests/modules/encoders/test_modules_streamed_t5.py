"""T5 whose weights stay in their files but for the block at work."""

import pytest
import torch
from safetensors.torch import load_file

from sgm.modules.encoders.modules import FrozenT5Embedder
from tools.make_random_weights import write_t5

TEXTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "t5"
    torch.manual_seed(0)
    write_t5(folder, width=64, num_layers=3)  # in float16
    return folder


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_streamed_embeddings_are_the_resident_ones_to_the_last_bit(t5, dtype):
    resident, streamed = (
        FrozenT5Embedder(str(t5), 12, dtype=dtype, streamed=streamed) for streamed in (False, True)
    )
    expected = resident(TEXTS)
    for _ in range(2):  # the first call leaves all as it was
        result = streamed(TEXTS)
        assert result.dtype == expected.dtype and torch.equal(result, expected)


def test_streamed_weights_wait_as_the_files_have_them(t5):
    files = load_file(t5 / "model.safetensors")
    encoder = FrozenT5Embedder(str(t5), 12, dtype=torch.float32, streamed=True).transformer
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    seen = []

    def look(block, *_):
        seen.append({weight.dtype for weight in block.parameters()})
        others = [w for b in encoder.encoder.block if b is not block for w in b.parameters()]
        assert {weight.dtype for weight in others} == {torch.float16}

    for block in encoder.encoder.block:
        block.layer[0].register_forward_pre_hook(lambda *_, block=block: look(block))
    encoder(input_ids=torch.ones(1, 12, dtype=torch.long))
    assert seen == [{torch.float32}] * 3  # the run's type, while a block works
    for name, weight in encoder.named_parameters():
        assert weight.dtype == torch.float16 and torch.equal(weight, files[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bytes_that_are_planned_are_those_that_are_loaded(t5, dtype):
    weights = FrozenT5Embedder(str(t5), 12, dtype=dtype).parameters()
    planned = FrozenT5Embedder(t5, 12, dtype=dtype, device="meta").parameters()
    assert sum(w.nbytes for w in planned) == sum(weight.nbytes for weight in weights)
