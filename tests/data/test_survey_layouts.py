"""The layouts of a data folder, with empty files that have names of clips."""

import errno
import json
import logging
import os

import pytest

from sgm.data.frames import ClipError
from sgm.data.survey import find_samples
from sgm.errors import UserError


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def samples(folder):
    """Samples as text: the clip's name within the folder, and its caption or the reason."""
    found = {}
    for path, caption in find_samples(folder):
        name = str(path.relative_to(folder) if path.is_relative_to(folder) else path)
        found[name] = f"! {caption}" if isinstance(caption, ClipError) else caption
    return found


def test_videos_and_labels_at_any_depth_under_any_name(tmp_path):
    folder = tmp_path / "my videos"  # the name of the folder itself does not matter
    pairs = {
        "videos/first.mp4": "labels/first.txt",
        "set 1/videos/straße 中.MP4": "set 1/labels/straße 中.txt",
        "videos/a/b.c.mp4": "labels/a/b.c.txt",
        "videos/x/videos/y.mp4": "videos/x/labels/y.txt",
        "videos/z.mov": "labels/z.txt",
    }
    write(folder, dict.fromkeys(pairs, ""))
    write(folder, {label: f"\ufeff  {clip}\nline 2\n\n" for clip, label in pairs.items()})
    write(folder, dict.fromkeys(("other.mp4", "videos/._first.mp4", "videos/notes.txt"), ""))
    assert samples(folder) == {clip: f"{clip}\nline 2" for clip in pairs}


def test_captions_that_are_absent_empty_or_no_text_are_reasons(tmp_path):
    write(tmp_path, {f"videos/{name}.mp4": "" for name in "abcd"})
    write(tmp_path, {"labels/a.txt": "fine", "labels/b.txt": " \n"})
    (tmp_path / "labels" / "c.txt").write_bytes("Straße".encode("latin-1"))
    found = samples(tmp_path)
    assert found["videos/a.mp4"] == "fine"
    assert found["videos/b.mp4"] == f"! its label {tmp_path}/labels/b.txt holds no text"
    assert "cannot be read" in found["videos/c.mp4"]
    assert found["videos/d.mp4"] == f"! its label {tmp_path}/labels/d.txt does not exist"


def test_pairs_in_one_folder_at_any_depth(tmp_path):
    write(tmp_path, {"a.mp4": "", "a.txt": "one", "deep/b.webm": "", "deep/b.txt": "two\nmore"})
    write(tmp_path, {"c.mp4": ""})
    found = samples(tmp_path)
    assert found.pop("c.mp4") == f"! its label {tmp_path}/c.txt does not exist"
    assert found == {"a.mp4": "one", "deep/b.webm": "two\nmore"}


@pytest.mark.parametrize("prompts", ["prompts.txt", "prompt.txt"])
def test_lists_of_prompts_and_videos(tmp_path, prompts):
    names = ["videos/a.mp4", "/elsewhere/b.mp4", "c.mp4", ""]
    captions = ["one\u2028more", " two ", "", "four"]
    write(tmp_path, {prompts: "\r\n".join([*captions, "", ""]), "videos.txt": "\n".join(names)})
    write(tmp_path, {"videos.txt": "\n".join([*names[:3], "d.mp4"])})
    assert samples(tmp_path) == {
        "videos/a.mp4": "one\u2028more",
        "/elsewhere/b.mp4": "two",
        "c.mp4": f"! its caption, {tmp_path / prompts}:3, holds no text",
        "d.mp4": "four",
    }


def test_lists_of_different_lengths_are_an_error_with_both(tmp_path):
    write(tmp_path, {"prompts.txt": "a\nb\nc\n", "videos.txt": "a.mp4\nb.mp4\n"})
    with pytest.raises(UserError, match="prompts.txt has 3 lines, .*videos.txt has 2"):
        find_samples(tmp_path)


@pytest.mark.parametrize("clip_column", ["file_name", "video", "Path"])
@pytest.mark.parametrize("caption_column", ["text", "caption", "prompt"])
@pytest.mark.parametrize(("kind", "line"), [("csv", 4), ("jsonl", 2)])
def test_tables_of_either_form(tmp_path, clip_column, caption_column, kind, line):
    rows = [("a.mp4", 'one, "two"\nthree'), ("b c.mp4", " "), ("", "nothing")]
    csv = "".join('"{}",1,"{}"\n'.format(n, t.replace('"', '""')) for n, t in rows)
    lines = [json.dumps({clip_column: n, "n": 1, caption_column: t}) for n, t in rows]
    content = {
        "csv": f"\ufeff{clip_column},n,{caption_column}\n{csv}",
        "jsonl": "\n".join([*lines, "", ""]),
    }
    table = tmp_path / f"metadata.{kind}"
    write(tmp_path, {table.name: content[kind]})
    assert samples(tmp_path) == {
        "a.mp4": 'one, "two"\nthree',
        "b c.mp4": f"! its caption, {table}:{line}, holds no text",  # in CSV after one of two lines
        f"{table.name}:{line + 1}": "! the line names no clip",
    }


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("metadata.csv", "clip;text\na;b\n", r"column for the clip \(columns: clip;text\); rename"),
        ("metadata.csv", "file_name,words\na,b\n", "no column for the caption .*file_name, words"),
        ("metadata.jsonl", '{"video": "a.mp4"}\n', r"no column for the caption \(columns: video"),
        ("metadata.jsonl", '{"video": "a", "text": "b"}\n{"video"\n', "jsonl:2: .*one JSON object"),
        ("metadata.jsonl", "[1]\n", "jsonl:1: .*one JSON object"),
        ("metadata.csv", 'video,text\n"a,b\n', "must be CSV"),
        (
            "metadata.csv",
            "video,text\na,b\na,b, c,d\n",
            "csv:3: the row has more values .*quotes",
        ),
    ],
)
def test_a_table_that_is_wrong_is_an_error_with_the_place(tmp_path, name, text, named):
    write(tmp_path, {name: text})
    with pytest.raises(UserError, match=named):
        find_samples(tmp_path)


def test_of_several_layouts_the_first_is_used_and_the_others_are_named(tmp_path, caplog):
    lists = {"prompts.txt": "list", "videos.txt": "videos/a.mp4"}
    table = {"metadata.csv": "video,text\nvideos/a.mp4,table\n"}
    labels = {"videos/a.mp4": "", "labels/a.txt": "label"}
    write(tmp_path, lists)
    for files, caption in (({}, "list"), (table, "table"), (labels, "label")):
        write(tmp_path, files)
        assert samples(tmp_path) == {"videos/a.mp4": caption}
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [
        f"{tmp_path}: captions are taken from metadata.csv, not from prompts.txt and videos.txt",
        f"{tmp_path}: captions are taken from videos/ and labels/, "
        "not from metadata.csv, prompts.txt and videos.txt",
    ]


def test_links_are_followed_but_in_no_circle(tmp_path):
    write(tmp_path / "store", {"videos/a.mp4": "", "labels/a.txt": "caption"})
    data = tmp_path / "data"
    (data / "videos").mkdir(parents=True)
    (data / "videos" / "linked").symlink_to(tmp_path / "store" / "videos")
    (data / "videos" / "linked" / "circle").symlink_to(data)
    (data / "videos" / "itself").symlink_to("itself")
    (data / "labels").mkdir()
    (data / "labels" / "linked").symlink_to(tmp_path / "store" / "labels")
    assert samples(data) == {"videos/linked/a.mp4": "caption"}


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        find_samples(tmp_path)


def test_a_folder_that_is_absent_or_empty(tmp_path):
    assert find_samples(tmp_path) == []
    with pytest.raises(UserError, match="No such file.*videos/NAME.mp4 .* labels/NAME.txt"):
        find_samples(tmp_path / "absent")
    write(tmp_path, {"clip.mp4": ""})
    with pytest.raises(UserError, match="clip.mp4 cannot be read .Not a directory.; it must be"):
        find_samples(tmp_path / "clip.mp4")


def test_commas_at_the_end_of_a_row_are_nothing(tmp_path):
    write(tmp_path, {"metadata.csv": "video,text\na.mp4,caption,, \n", "a.mp4": ""})
    assert samples(tmp_path) == {"a.mp4": "caption"}


def test_half_a_character_is_no_caption(tmp_path):
    write(tmp_path, {"metadata.jsonl": '{"video": "a.mp4", "text": "\\ud800"}\n', "a.mp4": ""})
    (sample,) = find_samples(tmp_path)
    assert "metadata.jsonl:1, holds no text" in str(sample[1])
