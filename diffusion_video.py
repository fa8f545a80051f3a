"""The module from which SAT's scripts and older code import the engine of sgm/engine.py."""

from sgm.engine import SATVideoDiffusionEngine

__all__ = ["SATVideoDiffusionEngine"]
