"""Kits: one file with a bundle and all that a machine without a network needs to check it, for `edgelm package`."""

from edgelm.kit.package import KitResult, package

__all__ = ["KitResult", "package"]
