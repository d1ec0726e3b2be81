"""Build graphs from a decoder's spec: one builder for each operator set."""
