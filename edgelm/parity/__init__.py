"""Proof, on the device, that a bundle computes what the PyTorch reference computes, and where it does not.

`golden` makes the parity pack at export; `check` runs it on a device; `report` writes the HTML. Importing this package
imports none of them.
"""
