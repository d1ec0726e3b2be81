"""A small HTTP service with a model, on the Python standard library alone.

    python examples/embed.py bundles/demo/olmoe-tiny-int4
    curl -N localhost:8080/complete -d '{"prompt": "import os", "max_tokens": 40}'

The model is loaded once, and the requests of all threads use it in turn. Text is sent as it is generated. A client that
disconnects stops its generation. A bad request is answered with the error's message. An asyncio app uses `async for`
on the same streams, and `model.generate_many` answers many prompts at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import edgelm

OPTIONS = edgelm.GenerateOptions.__annotations__


class App(ThreadingHTTPServer):
    """Server that holds the model. Requests wait for it in the model's own queue."""

    daemon_threads = True

    def __init__(self, model: edgelm.LanguageModel, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model = model


class Handler(BaseHTTPRequestHandler):
    """Answer `POST /complete` with the text as it is generated."""

    server: App

    def do_POST(self) -> None:
        """Handle a request: {"prompt": text} or {"messages": [...]}, with any of OPTIONS."""
        try:
            request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            options = {name: request[name] for name in OPTIONS if name in request}
            model = self.server.model
            if "messages" in request:
                stream = model.chat_stream(request["messages"], **options)
            else:
                stream = model.stream(request["prompt"], **options)
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()
            # The first piece reserves the model for this request, until the loop or the stream ends.
            with contextlib.closing(stream):
                for piece in stream:
                    self.wfile.write(piece.encode())
                    self.wfile.flush()
        except (edgelm.EdgeLMError, ValueError, KeyError, TypeError) as error:
            # Nothing was streamed yet: options, prompt and length are checked when a stream is made.
            self.send_error(400, "bad request", str(error))
        except ConnectionError:
            # The client disconnected. Leaving the loop stopped the generation; the model is free for the next request.
            self.close_connection = True


def main() -> None:
    """Load the bundle and serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    with edgelm.load(arguments.bundle, threads=arguments.threads) as model, App(model, arguments.port) as app:
        print(f"listening on http://127.0.0.1:{app.server_port}", flush=True)
        try:
            app.serve_forever()
        except KeyboardInterrupt:
            print("bye")


if __name__ == "__main__":
    main()
