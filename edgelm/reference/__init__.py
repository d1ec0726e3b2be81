"""The PyTorch reference: in memory, and layer by layer from disk."""
