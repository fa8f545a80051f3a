"""Digests of files: of a whole small file, of samples of a large one."""

import hashlib

import pytest

from sgm.checkpoint.weight_file import WeightFile
from sgm.data import cache_keys
from sgm.data.cache_keys import hash_file, hash_weights, window_position

MIB = 1 << 20


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file of 20 MiB that counts as large: samples are at 8 MiB and 16 MiB."""
    monkeypatch.setattr(cache_keys, "WHOLE_BYTES", MIB)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(20 * MIB))
    return path


def put(path, place):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"x")


def test_a_small_file_is_digested_whole(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc" * MIB)
    assert hash_file(path) == hashlib.blake2b(b"abc" * MIB, digest_size=20).hexdigest()
    assert hash_weights(WeightFile(path)) == hash_file(path)


@pytest.mark.parametrize("place", [0, MIB - 1, 8 * MIB, 16 * MIB + 4095, 19 * MIB, 20 * MIB - 1])
def test_a_large_file_is_known_by_its_ends_and_samples(large, place):
    before = hash_weights(WeightFile(large))
    assert hash_weights(WeightFile(large)) == before
    put(large, place)
    assert hash_weights(WeightFile(large)) != before


def test_a_large_file_is_known_by_its_size_and_not_read_between_samples(large):
    before = hash_weights(WeightFile(large))
    put(large, 2 * MIB)
    assert hash_weights(WeightFile(large)) == before
    with large.open("ab") as file:
        file.write(bytes(1))
    assert hash_weights(WeightFile(large)) != before


def test_the_window_is_at_both_ends_of_what_keys_can_be():
    assert window_position("0" * 40) == 0
    assert 0.999 < window_position("f" * 40) < 1
