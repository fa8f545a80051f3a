"""Text-to-video generation with CogVideoX on SwissArmyTransformer: ``from sgm import CogVideoX``.

Only a part of SAT is imported (see sgm/sat_runtime.py). PyTorch is imported when `CogVideoX` is
first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgm.sat_runtime import leave_out_unused_parts

if TYPE_CHECKING:
    from sgm.pipeline import CogVideoX, Step, Video

__all__ = ["CogVideoX", "Step", "Video"]

leave_out_unused_parts()


def __getattr__(name: str) -> type[CogVideoX] | type[Step] | type[Video]:
    """Import `CogVideoX`, `Step` or `Video` only on first use, because the import takes seconds.

    Python calls this function for names that the module does not have (PEP 562).
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sgm import pipeline

    return getattr(pipeline, name)
