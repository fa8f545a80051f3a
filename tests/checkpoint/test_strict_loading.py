"""The comparison of a file's keys with a model's."""

import pytest
import torch

from sgm.checkpoint.strict_loading import check_fit
from sgm.errors import UserError


def tensors(*names, size=2):
    return {name: torch.empty(size, device="meta") for name in names}


def error_of(found, wanted):
    with pytest.raises(UserError) as failure:
        check_fit(found, wanted, path="weights.pt", hint="use others")
    return str(failure.value)


def test_equal_names_and_shapes_fit_in_any_order_and_type():
    found = {name: tensor.half() for name, tensor in tensors("b", "a").items()}
    check_fit(found, tensors("a", "b"), path="weights.pt", hint="")


def test_every_kind_is_named_in_one_sentence_with_the_hint():
    found = tensors("a", "extra") | tensors("b", size=3)
    assert error_of(found, tensors("a", "b", "gone")) == (
        "weights.pt does not fit the model of the configuration: keys 1 of another shape "
        "(b is [3] in the file, [2] in the model); 1 missing (gone); 1 unknown (extra); use others"
    )


def test_of_each_kind_three_are_named_and_all_are_counted():
    wanted = tensors("m1", "m2", "m3", "m4") | tensors("s1", "s2", "s3", "s4")
    found = tensors("u1", "u2", "u3", "u4") | tensors("s1", "s2", "s3", "s4", size=9)
    message = error_of(found, wanted)
    assert "4 missing (m1, m2, m3, …)" in message and "4 unknown (u1, u2, u3, …)" in message
    assert "4 of another shape" in message and message.count("in the file") == 3


def test_exactly_three_are_named_without_dots():
    assert "3 missing (a, b, c);" in error_of({}, tensors("a", "b", "c"))


def test_whole_numbers_are_not_weights():
    found = tensors("a") | {"b": torch.empty(2, dtype=torch.int8, device="meta")}
    assert "keys 1 of integer type (b is int8);" in error_of(found, tensors("a", "b"))
    check_fit(found, found, path="weights.pt", hint="")  # where the model has them too
