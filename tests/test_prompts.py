"""Prompt files and the folders' names."""

import io

import pytest

from sgm.errors import UserError
from sgm.prompts import Prompt, read_prompt_file, read_typed_prompts


def test_blank_lines_are_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\n  a dög \n".encode())
    assert read_prompt_file("~/prompts.txt") == [Prompt(0, "a cat"), Prompt(2, "a dög")]


def test_typed_prompts_end_with_the_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\n\na dog"))
    assert list(read_typed_prompts()) == [Prompt(0, "a cat"), Prompt(2, "a dog")]


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_typing_nothing_is_an_error(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    with pytest.raises(UserError, match="no prompt was typed"):
        list(read_typed_prompts())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "contains no prompt"),
        (b" \n\n", "contains no prompt"),
        (b"a caf\xe9", "not valid UTF-8"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_prompt_file(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_prompt_file(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="Is a directory"):
        read_prompt_file(tmp_path)
    with pytest.raises(UserError, match="null byte"):
        read_prompt_file("a\0b")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a red circle", "3_a red circle"),
        ("../../etc/passwd", "3_etc_passwd"),
        ("a/b\\c:d*e?f\x00g", "3_a_b_c_d_e_f_g"),
        ("...", "3_prompt"),
        ("一只猫", "3_一只猫"),
        ("x" * 500, "3_" + "x" * 120),
    ],
)
def test_folder_names_are_safe(text, name):
    assert Prompt(3, text).folder_name == name


def test_folder_names_fit_into_255_bytes_and_the_folder_can_be_made(tmp_path):
    name = Prompt(12, "猫" * 500).folder_name
    assert len(name.encode()) <= 255
    (tmp_path / name).mkdir()
