"""Check on a device that a bundle computes what the PyTorch reference computes, and find where it does not.

`golden` makes the parity pack at export; `check` runs it on a device; `report` writes the HTML. Importing this package
imports none of them.
"""
