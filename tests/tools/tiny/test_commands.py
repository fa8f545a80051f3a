"""The commands that make data and weights for the bundled model, at the smallest sizes."""

import math
import sys

import decord
import pytest
import torch
from omegaconf import OmegaConf
from sentencepiece import SentencePieceProcessor
from torch.utils.data import default_collate

from sgm.errors import UserError
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.encoders.modules import FrozenT5Embedder
from tools.evaluate_tiny import fidelity
from tools.tiny import draw_clips, latents, make_t5, train_vae
from tools.tiny.shapes import ShapeClips, parse_caption


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration whose autoencoder has random weights in place."""
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    vae = train_vae.build(train_vae.CONFIG, load=None, learning_rate=1e-3, kl_weight=1e-6)
    train_vae.save(vae, folder / "vae" / "3d-vae.pt")
    config = OmegaConf.load(train_vae.CONFIG)
    config.model.first_stage_config.params.ckpt_path = str(folder / "vae" / "3d-vae.pt")
    OmegaConf.save(config, folder / "config.yaml")
    return folder / "config.yaml"


def test_drawn_folder_has_the_layout_of_fine_tuning_data(tmp_path):
    draw_clips.main(["--output", str(tmp_path / "data"), "--count", "2", "--seed", "3"])
    clips = ShapeClips(2, seed=3)
    assert sorted(p.name for p in (tmp_path / "data" / "videos").iterdir()) == ["0.mp4", "1.mp4"]
    for index in range(2):
        label = (tmp_path / "data" / "labels" / f"{index}.txt").read_text("utf-8")
        assert label.strip() == clips.caption(index)
        reader = decord.VideoReader(str(tmp_path / "data" / "videos" / f"{index}.mp4"))
        assert len(reader) == 17 and reader.get_avg_fps() == 8
        assert reader[0].shape == (64, 96, 3)


def test_drawing_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        draw_clips.main(["--output", str(tmp_path)])


def test_t5_folder_loads_and_spells_words_that_no_caption_has(tmp_path, monkeypatch):
    monkeypatch.setattr(make_t5, "NUM_CAPTIONS", 300)
    folder = tmp_path / "t5"
    assert run(make_t5, monkeypatch, "--output", folder) == 0
    pieces = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id()) == (0, 1, 2)
    caption = "on a gray background, a magenta triangle is moving right"
    assert (
        len(pieces.encode(caption)) == len(caption.split()) + 1
    )  # one token a word, and the comma
    embedder = FrozenT5Embedder(str(folder), max_length=32)
    ids = embedder.tokenizer(["a panda", "龙在天上飞 🐉"])
    assert ids.shape == (2, 32) and int(ids.max()) < embedder.transformer.config.vocab_size
    assert not (ids == pieces.unk_id()).any()
    assert embedder(["龙在天上飞 🐉"]).isfinite().all()
    with pytest.raises(UserError, match="exists"):
        run(make_t5, monkeypatch, "--output", folder)


def test_latents_file_gives_back_what_the_encoder_made(config, tmp_path, monkeypatch):
    path = tmp_path / "latents.safetensors"
    flags = ["--output", path, "--config", config, "--count", 3, "--seed", 4, "--held-out"]
    assert run(latents, monkeypatch, *flags, "--batch-size", 2, "--num-workers", 0) == 0
    stored, clips = latents.LatentClips(str(path)), ShapeClips(3, seed=4, held_out=True)
    assert len(stored) == 3
    batch = default_collate([stored[index] for index in range(3)])
    assert batch["mp4"].shape == (3, 5, 8, 8, 12) and batch["mp4"].dtype == torch.float32
    assert batch["txt"] == [clips.caption(index) for index in range(3)]
    parse_caption(batch["txt"][0])
    checkpoint = OmegaConf.load(config).model.first_stage_config.params.ckpt_path
    vae = train_vae.build(str(config), load=None, learning_rate=1e-3, kl_weight=1e-6).eval()
    vae.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    with torch.no_grad():
        moments, _ = vae.encode(clips[2]["mp4"].transpose(0, 1)[None], unregularized=True)
    expected = moments[0, :8].transpose(0, 1)
    # The file holds float16: 11 bits, so values are off by at most 2**-11 of themselves.
    torch.testing.assert_close(stored[2]["mp4"], expected, rtol=1e-3, atol=1e-4)


def test_psnr_of_a_known_error():
    target = torch.zeros(2, 3, 1, 4, 4)
    video = torch.stack([target[0] + 0.2, target[0] + 0.02])
    # 20 log10(peak to peak 2 / error): 20 dB for 0.2, 40 dB for 0.02; float32 to 1e-4 dB.
    torch.testing.assert_close(
        train_vae.psnr(video, target), torch.tensor([20.0, 40.0]), atol=1e-4, rtol=0
    )


def test_learning_rate_rises_then_falls_to_zero():
    vae = train_vae.build(train_vae.CONFIG, load=None, learning_rate=1e-3, kl_weight=1e-6)
    vae.num_steps, vae.warmup_steps = 1000, 100
    factor = vae.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert factor(0) == pytest.approx(0.01)
    # The warm-up ends after 100 steps; the half cosine is 0.5 in the middle and 0 from its end.
    assert factor(500) == pytest.approx(0.5)
    assert factor(1000) == pytest.approx(0) and factor(1500) == pytest.approx(0)
    assert isinstance(vae, VideoAutoencoderInferenceWrapper)


def test_fidelity_of_an_untrained_autoencoder_is_low(config):
    values = fidelity([str(config)], 1)
    assert values.shape == (1,) and math.isfinite(values[0]) and values[0] < 25
