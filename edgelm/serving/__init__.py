"""The server of `edgelm serve`: an engine per bundle that batches requests, and an HTTP interface like OpenAI's."""
