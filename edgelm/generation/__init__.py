"""Text generation with a loaded bundle: sampling, stop strings, streams, batches, chat."""
