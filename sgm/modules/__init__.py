"""The parts that configurations wire together."""

from sgm.modules.conditioner import GeneralConditioner

__all__ = ["GeneralConditioner"]
