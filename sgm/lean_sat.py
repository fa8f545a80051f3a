"""SwissArmyTransformer (SAT) without the parts of it that nobody asked for.

Its packages import all of their models and its own trainer, and with these wandb, datasets, pandas,
transformers and DeepSpeed: two seconds, and many more where files come over a network. Here such a
package counts as imported before its code has run. That runs when a name is wanted which is not a
module of its own, so that the package has all that it has otherwise.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_PACKAGES = ("sat", "sat.model")  # outer ones first


def leave_out_unused_parts() -> None:
    """To be called before SAT is imported; without effect after that, or where it is absent."""
    if "sat" in sys.modules or find_spec("sat") is None:
        return
    for name in _PACKAGES:
        package = _unexecuted(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, package)


def _unexecuted(name: str) -> ModuleType:
    """The package `name`, imported but for its code."""
    spec = find_spec(name)
    package = module_from_spec(spec)

    def find(attribute: str) -> Any:
        is_special = attribute.startswith("__") and attribute != "__all__"  # which `*` asks for
        if is_special:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        if find_spec(f"{name}.{attribute}") is not None:
            return importlib.import_module(f"{name}.{attribute}")
        del package.__getattr__
        spec.loader.exec_module(package)
        return getattr(package, attribute)

    package.__getattr__ = find  # for what the package does not have yet (PEP 562)
    sys.modules[name] = package
    return package
