"""Building blocks of the models; a configuration combines them."""

from sgm.modules.conditioner import GeneralConditioner

__all__ = ["GeneralConditioner"]
