"""A loaded model that continues text: sampling, stop strings, streams, batches."""
