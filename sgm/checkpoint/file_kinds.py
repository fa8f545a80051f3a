"""Files that are recognisably no weights: what to call them."""

from __future__ import annotations

from pathlib import Path

from sgm.checkpoint.reading import check_kind
from sgm.errors import UserError

# Position and bytes by which a kind of file is known, and its name in a sentence.
_MARKS = (
    (4, b"ftyp", "a video or picture (mp4, mov, heic …)"),
    (0, b"\x1a\x45\xdf\xa3", "a video (mkv or webm)"),
    (8, b"AVI ", "a video (avi)"),
    (8, b"WEBP", "a picture (webp)"),
    (0, b"\x89PNG", "a picture (png)"),
    (0, b"\xff\xd8\xff", "a picture (jpeg)"),
    (0, b"GIF8", "a picture (gif)"),
    (0, b"%PDF", "a PDF document"),
    (0, b"GGUF", "a GGUF file of llama.cpp and ComfyUI"),
    (0, b"\x89HDF", "an HDF5 file, as TensorFlow's weights are"),
    (0, b"\x93NUMPY", "an array of NumPy"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (0, b"Rar!", "a rar archive; unpack it first"),
    (0, b"BZh", "a bzip2 archive; unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (0, b"\x7fELF", "a program"),
)
_HEAD_BYTES = 4096


def refuse_other_files(path: Path) -> None:
    """Refuse a file that its first bytes show to be something else than weights.

    Raises:
        UserError: it is, or it cannot be read; the sentence says what it is.
    """
    check_kind(path)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for position, mark, name in _MARKS:
        if head[position : position + len(mark)] == mark:
            raise UserError(f"{path} is {name}, not weights; name a .pt or .safetensors file")
    if _is_text(head):
        raise UserError(
            f"{path} is a text file, not weights; name a .pt or .safetensors file, or the folder "
            "that they are in"
        )


def _is_text(head: bytes) -> bool:
    """Whether there are but printable characters; a safetensors header has its length before."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not just a character that is cut off
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)
