"""Text to tokens and back with the files of a checkpoint, and its chat template."""
