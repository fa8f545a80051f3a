"""Parts of the models, which a configuration combines."""

from sgm.modules.conditioner import GeneralConditioner

__all__ = ["GeneralConditioner"]
