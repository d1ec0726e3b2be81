"""The two answers of `edgelm doctor`: what this machine can do, and whether a model fits."""
