"""The cache is never stale or incomplete: changes, interruption and damage."""

import json
import logging
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgm.checkpoint.find import find_autoencoder
from sgm.data import cache, cache_keys
from sgm.errors import UserError
from sgm.models.autoencoder import build_first_stage


def change_clip(clips, model, changes):
    (clips / "1.mp4").write_bytes(b"another")


def change_rate(clips, model, changes):
    changes["fps"] = 16


def change_window(clips, model, changes):
    changes["random_window"] = True


def change_autoencoder(clips, model, changes):
    params = model["first_stage_config"]["params"]
    copy = Path(shutil.copy(params["ckpt_path"], clips / "vae.pt"))
    state = torch.load(copy)
    state["state_dict"]["encoder.conv_in.conv.bias"] += 1e-3
    torch.save(state, copy)
    params["ckpt_path"] = str(copy)


def edit_t5(clips, model, edit):
    params = model["conditioner_config"]["params"]["emb_models"][0]["params"]
    folder = Path(shutil.copytree(params["model_dir"], clips / "t5"))
    edit(folder)
    params["model_dir"] = str(folder)


def change_text_weights(clips, model, changes):
    def edit(folder):
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    edit_t5(clips, model, edit)


def change_text_config(clips, model, changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-5}))

    edit_t5(clips, model, edit)


def change_length(clips, model, changes):
    model["conditioner_config"]["params"]["emb_models"][0]["params"]["max_length"] = 31


def change_nothing(clips, model, changes):
    """The same files elsewhere, and other times."""
    edit_t5(clips, model, lambda folder: None)
    params = model["first_stage_config"]["params"]
    params["ckpt_path"] = shutil.copy(params["ckpt_path"], clips / "moved.pt")
    for path in clips.glob("*.mp4"):
        path.rename(path.with_name(f"moved {path.name}"))


@pytest.mark.parametrize(
    ("change", "latents", "embeddings"),
    [
        (change_clip, 1, 0),
        (change_rate, 3, 0),
        (change_window, 3, 0),
        (change_autoencoder, 3, 0),
        (change_text_weights, 0, 3),
        (change_text_config, 0, 3),
        (change_length, 0, 3),
        (change_nothing, 0, 0),
    ],
)
def test_what_has_changed_is_made_anew_and_nothing_else(
    stand_in, kept, prepare, clips, model, made, change, latents, embeddings
):
    captions, settings = stand_in(clips).captions, {}
    change(clips, model, settings)
    dataset = stand_in(clips, **settings)
    dataset.captions = captions
    prepare(dataset, model=model)
    folders = [folder for folder, _ in made]
    assert (folders.count("latents"), folders.count("embeddings")) == (latents, embeddings)


def replace(path):
    """Replace the file by another one, as downloads do."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def edit(path):
    """Write to the file itself."""
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize("change", [replace, edit])
@pytest.mark.parametrize("moment", ["after the check", "after the digest"])
def test_weights_that_change_while_the_cache_is_made_give_no_entries(
    stand_in, prepare, clips, model, made, monkeypatch, tmp_path, change, moment
):
    node = model["first_stage_config"]
    path = Path(shutil.copy(node["params"]["ckpt_path"], tmp_path / "vae.pt"))
    os.utime(path, (0, 0))
    node["params"]["ckpt_path"] = find_autoencoder(path)
    build_first_stage(node, dtype=torch.float32, device="meta")
    if moment == "after the check":
        change(path)
    else:
        digest = cache.model_digest

        def change_afterwards(node, weights):
            found = digest(node, weights)
            change(path)
            return found

        monkeypatch.setattr(cache, "model_digest", change_afterwards)
    with pytest.raises(UserError, match="autoencoder changed while the cache was made"):
        prepare(stand_in(clips))
    assert not made


def test_another_caption_has_an_entry_of_its_own(stand_in, kept, prepare, clips, made):
    dataset = stand_in(clips)
    dataset.captions[2] += " "
    prepare(dataset)
    assert [folder for folder, _ in made] == ["embeddings"]


def test_another_precision_has_entries_of_its_own(stand_in, kept, prepare, clips, made):
    dataset = stand_in(clips)
    item = prepare(dataset, dtype=torch.bfloat16).dataset(dataset)[0]
    assert len(made) == 6
    assert item["moments"].dtype == item["crossattn"].dtype == torch.bfloat16


def test_an_interrupted_run_is_finished_by_the_next(
    stand_in, finished, prepare, clips, made, monkeypatch, tmp_path, files
):
    # Clips count as just written, however slow the machine is, so there is no contents.json.
    monkeypatch.setattr(cache_keys, "_TICK_SECONDS", math.inf)
    replace = os.replace

    def interrupt(source, target):
        if len(made) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(stand_in(clips))
    assert len(files(tmp_path / "cache")) == 2
    prepare(stand_in(clips), texts=["a blue square"])
    assert len(made) == 7 and len(set(made)) == 7  # nothing twice
    assert files(tmp_path / "cache") == files(finished)


SPOILS = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "garbage": lambda path: path.write_bytes(b"\xff" * 4000),
    "something else": lambda path: save_file({"other": torch.zeros(2)}, path),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_damaged_entry_is_named_and_made_anew(
    stand_in, kept, finished, prepare, clips, caplog, spoil, files
):
    damaged = [min((kept / folder).iterdir()) for folder in ("latents", "embeddings")]
    for path in damaged:
        spoil(path)
    with caplog.at_level(logging.WARNING, logger="sgm"):
        prepare(stand_in(clips), texts=["a blue square"])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all(f"{p} is damaged" in line for p, line in zip(damaged, lines, strict=True))
    assert files(kept) == files(finished)
