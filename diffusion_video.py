"""The engine of sgm/engine.py, under the module name that SAT's scripts and older code import."""

from sgm.engine import SATVideoDiffusionEngine

__all__ = ["SATVideoDiffusionEngine"]
