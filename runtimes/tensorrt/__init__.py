"""TensorRT and TensorRT-RTX: our operators as plugins, engines of a bundle, and what runs them."""
