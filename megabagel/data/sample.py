"""The sample schema under the name that sources use; it is defined one floor below, where the packer reads it.

Nothing else lives here.
"""

from megabagel.packing.sample import Item, ItemType, Sample

__all__ = ["Item", "ItemType", "Sample"]
