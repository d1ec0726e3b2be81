"""PyTorch reference: interprets a spec in float32, with weights in memory or read layer by layer from disk."""
