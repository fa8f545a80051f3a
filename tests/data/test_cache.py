"""Training from the cache is exact and loads no encoder; clips that cannot be used are skipped."""

import json
import logging
import shutil
import time

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

from data_video import SFTDataset
from sgm.data import cache, cache_keys
from sgm.engine import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.training.loop import TrainingObjective
from sgm.util import check_params, instantiate_from_config
from tools.tiny.draw_clips import write_clips
from tools.tiny.shapes import ShapeClips


@pytest.fixture
def unloadable(monkeypatch):
    """A function; after its call neither autoencoder nor text encoder can be built."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    def call():
        monkeypatch.setattr(VideoAutoencoderInferenceWrapper, "__init__", refuse)
        monkeypatch.setattr(FrozenT5Embedder, "__init__", refuse)

    return call


def losses(engine, dataset):
    """Losses of batches of two, seeded as the training loop does."""
    found = []
    for seed, batch in enumerate(DataLoader(dataset, batch_size=2)):
        torch.manual_seed(seed)
        found.append(TrainingObjective(engine)(*engine.get_input(batch)).detach())
    return torch.stack(found)


def test_a_run_from_the_cache_gives_the_same_losses_to_the_bit(
    model, prepare, unloadable, tmp_path
):
    write_clips(ShapeClips(4, seed=0), tmp_path / "data")
    # Clips are longer than items; both runs use the first window.
    dataset = SFTDataset(
        tmp_path / "data", [32, 48], fps=8, max_num_frames=5, skip_frms_num=0, random_window=False
    )
    model["conditioner_config"]["params"]["emb_models"][0]["ucg_rate"] = 0.5
    model["network_config"]["params"] |= {
        "num_layers": 1, "num_frames": 5, "latent_height": 4, "latent_width": 6
    }  # fmt: skip
    params = check_params(SATVideoDiffusionEngine, model, where="model")
    torch.manual_seed(0)
    engine = SATVideoDiffusionEngine(**params).train()
    with torch.no_grad():
        for weight in engine.model.parameters():  # the last layer begins as zeros
            weight.add_(0.02 * torch.randn_like(weight))
    expected = losses(engine, dataset)
    cache = prepare(dataset, model=model)
    unloadable()
    cached = SATVideoDiffusionEngine(**params, cached_input=True).train()
    cached.model.load_state_dict(engine.model.state_dict())
    found = losses(cached, cache.dataset(dataset))
    assert len(expected) == 2 and torch.equal(found, expected)
    assert not any(name.startswith(("first", "cond")) for name in cached.state_dict())


def test_a_complete_cache_loads_neither_model_and_makes_nothing(
    stand_in, kept, prepare, clips, model, made, unloadable
):
    conditioner = instantiate_from_config(model["conditioner_config"]).eval()
    expected = conditioner.encode(["a blue square", "a red circle 0"])["crossattn"]
    unloadable()
    dataset = stand_in(clips)
    cache = prepare(dataset, texts=["a blue square"])
    assert not made and not dataset.positions  # nothing was decoded either
    assert torch.equal(cache.embed(["a blue square", "a red circle 0"])["crossattn"], expected)
    item = cache.dataset(dataset)[0]
    assert item["moments"].shape == (2, 16, 2, 3) and item["crossattn"].shape == (32, 128)
    assert torch.equal(item["crossattn"], expected[1])


def test_a_new_text_does_not_load_the_autoencoder(
    stand_in, kept, prepare, clips, made, monkeypatch
):
    monkeypatch.setattr(VideoAutoencoderInferenceWrapper, "__init__", None)
    prepare(stand_in(clips), texts=["another prompt"])
    assert [folder for folder, _ in made] == ["embeddings"]


def test_a_new_clip_does_not_load_the_text_encoder(
    stand_in, kept, prepare, clips, made, monkeypatch
):
    monkeypatch.setattr(FrozenT5Embedder, "__init__", None)
    (clips / "3.mp4").write_bytes(b"one more")
    dataset = stand_in(clips)
    dataset.captions[3] = "a blue square"
    assert len(prepare(dataset).dataset(dataset)) == 4
    assert [folder for folder, _ in made] == ["latents"]


def test_an_entry_that_is_spoilt_later_is_one_sentence(stand_in, kept, prepare, clips):
    dataset = stand_in(clips)
    items = prepare(dataset).dataset(dataset)
    for path in (kept / "latents").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="latents/.* cannot be read .*start again"):
        items[0]


def test_a_clip_that_cannot_be_decoded_is_left_out_and_loads_no_model(
    stand_in, kept, prepare, clips, caplog, unloadable
):
    captions = stand_in(clips).captions
    (clips / "1.mp4").write_bytes(b"damaged")
    unloadable()
    with caplog.at_level(logging.WARNING, logger="sgm"):
        dataset = stand_in(clips)
        items = prepare(dataset).dataset(dataset)
    assert len(items) == 2 and items.captions == [captions[0], captions[2]]
    (record,) = caplog.records
    assert record.getMessage() == f"{clips / '1.mp4'} is skipped: it cannot be decoded"


def test_a_clip_that_vanished_is_left_out(stand_in, kept, prepare, clips, caplog):
    dataset = stand_in(clips)
    (clips / "1.mp4").unlink()
    assert len(prepare(dataset).dataset(dataset)) == 2
    assert "1.mp4 is skipped: it cannot be read" in caplog.text


def test_a_clip_that_is_replaced_meanwhile_is_not_kept_under_the_old_name(
    stand_in, kept, prepare, clips, made, caplog
):
    class Replaced(stand_in):
        def read_clip(self, index, *, position=0.0):
            self.clips[0].write_bytes(b"new content")
            return super().read_clip(index, position=position)

    (clips / "0.mp4").write_bytes(b"not kept yet")
    dataset = Replaced(clips)
    assert len(prepare(dataset).dataset(dataset)) == 2 and not made
    assert "0.mp4 is skipped: it was changed while the cache was made" in caplog.text


def test_clips_are_read_at_the_first_start_only_and_a_wrong_digest_is_found(
    stand_in, kept, prepare, clips, monkeypatch, caplog
):
    names, whole, now = [], cache_keys.hash_file, time.time

    def hash_file(path):
        if path.suffix == ".mp4":  # the weights' files are hashed too
            names.append(path.name)
        return whole(path)

    monkeypatch.setattr(cache_keys, "hash_file", hash_file)
    monkeypatch.setattr(time, "time", lambda: now() + 10)  # files are not just written then
    dataset = stand_in(clips)
    prepare(dataset)
    prepare(dataset)
    assert sorted(names) == ["0.mp4", "1.mp4", "2.mp4"]
    memory = kept / "contents.json"
    content = json.loads(memory.read_text())
    content[str(clips / "1.mp4")][1] = "0" * 40
    memory.write_text(json.dumps(content))
    assert len(prepare(dataset).dataset(dataset)) == 2
    assert "1.mp4 is skipped: it was changed while the cache was made" in caplog.text
    assert names[3:] == []


def test_without_any_usable_clip_there_is_an_error(stand_in, kept, prepare, clips):
    for path in clips.iterdir():
        path.write_bytes(b"damaged " + path.name.encode())
    dataset = stand_in(clips)
    cache = prepare(dataset)
    with pytest.raises(UserError, match="none of the 3 clips can be decoded"):
        cache.dataset(dataset)


def test_the_window_is_the_first_or_drawn_by_the_clips_content(
    stand_in, finished, prepare, clips, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache, "encode_moments", lambda *_: torch.zeros(1, 2, 16, 2, 3))
    first, drawn, again = (stand_in(clips, random_window=value) for value in (False, True, True))
    for number, dataset in enumerate((first, drawn, again)):
        cache_dir = tmp_path / str(number)
        shutil.copytree(finished / "embeddings", cache_dir / "embeddings")
        prepare(dataset, cache_dir=cache_dir)
    assert set(first.positions.values()) == {0.0}
    assert drawn.positions == again.positions and len(set(drawn.positions.values())) == 3
    assert all(0 <= position < 1 for position in drawn.positions.values())


def test_joined_datasets_keep_their_order(stand_in, kept, prepare, clips, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "0.mp4").write_bytes((clips / "2.mp4").read_bytes())
    joined = ConcatDataset([stand_in(clips), stand_in(other)])
    cache = prepare(joined)
    items = cache.dataset(joined)
    assert items.captions == [c for part in joined.datasets for c in part.captions]
    assert torch.equal(items[3]["moments"], items[2]["moments"])
    assert torch.equal(cache.dataset(joined.datasets[1])[0]["moments"], items[3]["moments"])


def test_it_leaves_the_random_numbers_alone(stand_in, kept, prepare, clips):
    (clips / "3.mp4").write_bytes(b"one more")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    prepare(stand_in(clips))
    assert torch.equal(torch.get_rng_state(), before)


def test_data_without_clips_is_refused_by_name(prepare):
    with pytest.raises(UserError, match="args.cache_dir: TensorDataset has no clips"):
        prepare(torch.utils.data.TensorDataset(torch.zeros(2)))


def test_what_is_not_finite_is_not_kept(stand_in, prepare, clips, tmp_path, monkeypatch, files):
    moments = torch.full((1, 2, 16, 2, 3), float("nan"))
    monkeypatch.setattr(cache, "encode_moments", lambda *_: moments)
    with pytest.raises(UserError, match=r"0\.mp4 is not finite in torch.float32"):
        prepare(stand_in(clips))
    assert not files(tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda node: node.update(is_trainable=True), "is_trainable"),
        (lambda node: node.update(target="torch.nn.Identity"), "one FrozenT5Embedder"),
    ],
)
def test_only_embeddings_of_a_frozen_t5_are_kept(
    stand_in, kept, prepare, clips, model, change, words
):
    change(model["conditioner_config"]["params"]["emb_models"][0])
    with pytest.raises(UserError, match=f"cache_dir: .*{words}"):
        prepare(stand_in(clips), model=model)
