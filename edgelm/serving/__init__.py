"""The server of `edgelm serve`: an engine per bundle that batches requests, and an HTTP interface like OpenAI's.

`edgelm.serving.app.create_app` makes the application (ASGI), which any ASGI server can run. It needs the extra `serve`.
"""
