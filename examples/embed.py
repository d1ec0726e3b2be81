"""An app with a model inside: a small HTTP service that keeps conversations, on the Python standard library.

    python examples/embed.py bundles/demo/olmoe-tiny-int4
    curl -N localhost:8080/complete -d '{"prompt": "import os", "max_tokens": 40}'

It shows what any app has to decide: the model is loaded once, and the requests of all threads have it in turn; text is
passed on as it is generated; a client that goes away stops its generation; an unusable request is answered with the
error's own words. An app on asyncio uses `async for` on the same streams, and `model.generate_many` answers many
prompts at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import edgelm

OPTIONS = edgelm.GenerateOptions.__annotations__


class App(ThreadingHTTPServer):
    """Holds the model, for which requests wait in a queue of its own."""

    daemon_threads = True

    def __init__(self, model: edgelm.LanguageModel, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model = model


class Handler(BaseHTTPRequestHandler):
    """Answers `POST /complete` with the text as it comes."""

    server: App

    def do_POST(self) -> None:
        """{"prompt": text} or {"messages": [...]}, with any of OPTIONS."""
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
            # From the first piece on the model is this request's, until the loop or the stream ends.
            with contextlib.closing(stream):
                for piece in stream:
                    self.wfile.write(piece.encode())
                    self.wfile.flush()
        except (edgelm.EdgeLMError, ValueError, KeyError, TypeError) as error:
            # Before anything was streamed: options, prompt and length are checked when a stream is made.
            self.send_error(400, "bad request", str(error))
        except ConnectionError:
            # The client has gone. Leaving the loop stopped the generation, and the cache stays valid for the next one.
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
