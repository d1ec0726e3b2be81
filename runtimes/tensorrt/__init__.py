"""Runtime `tensorrt`: builds and runs engines of TensorRT and TensorRT-RTX, with our operators as plugins."""
