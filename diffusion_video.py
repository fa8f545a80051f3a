"""The name by which SAT's scripts and older code import the engine; it is in sgm/engine.py."""

from sgm.engine import SATVideoDiffusionEngine

__all__ = ["SATVideoDiffusionEngine"]
