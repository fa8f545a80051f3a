"""Random weights that are written tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5EncoderModel

from sgm.modules.encoders.modules import FrozenT5Embedder
from tools.make_random_weights import write_t5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_text_encoder_is_whole_for_us_and_for_transformers(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    write_t5(tmp_path / "t5", width=64, num_layers=2, dtype=dtype)
    tensors = load_file(tmp_path / "t5" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert tensors["shared.weight"].shape == (32128, 64)
    assert tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"].shape == (64, 160)
    assert tensors["shared.weight"].float().std().item() == pytest.approx(0.02, rel=0.01)
    embedder = FrozenT5Embedder(str(tmp_path / "t5"), max_length=8)
    theirs, told = T5EncoderModel.from_pretrained(
        tmp_path / "t5", dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    ids = embedder.tokenizer(["a red circle"])
    with torch.no_grad():
        embedding = embedder(["a red circle"])
        assert embedding.isfinite().all()
        torch.testing.assert_close(theirs.eval()(ids).last_hidden_state, embedding)
