"""What compiling needs of a machine, and the one warning where that is not there."""

import importlib.util
import shutil
import sysconfig

import pytest

from sgm import toolchain
from sgm.errors import UserError


@pytest.fixture(autouse=True)
def asked_for_the_first_time(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    toolchain.can_compile_kernels.cache_clear()
    yield
    toolchain.can_compile_kernels.cache_clear()


@pytest.fixture
def complete(monkeypatch, tmp_path):
    """A machine that has everything."""
    pytest.importorskip("triton")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(toolchain, "find_spec", importlib.util.find_spec)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    for name in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: "posix_local")
    places = {"posix_local": str(tmp_path / "local"), "posix_prefix": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme="posix_local": places[scheme])
    return tmp_path


def test_with_everything_there_is_no_warning(complete, caplog):
    assert toolchain.can_compile_kernels()
    assert caplog.messages == []


@pytest.mark.parametrize("lacking", ["triton", "gcc", "Python.h"])
def test_what_is_lacking_is_named_once(complete, monkeypatch, caplog, lacking):
    if lacking == "triton":
        monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    elif lacking == "gcc":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        (complete / "Python.h").unlink()
    assert not toolchain.can_compile_kernels()
    assert not toolchain.can_compile_kernels()
    (message,) = caplog.messages
    assert {"triton": "triton", "gcc": "install gcc", "Python.h": "headers"}[lacking] in message


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_compiling_is_refused_where_there_is_no_compiler(complete, monkeypatch, device_type):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    toolchain.check_compile(device_type)
    toolchain.can_compile_kernels.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="compile: a compiler .* leave compile out"):
        toolchain.check_compile(device_type)


def test_another_compiler_may_be_named(complete, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CC", "/opt/bin/cc")
    assert toolchain.can_compile_kernels()
