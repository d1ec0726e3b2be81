"""Endpoints of the HTTP API. Each takes the service, the request as a dataclass and the client, and returns an answer.

An answer is a dataclass of `edgelm.serving.api.answers`, or something that sends itself (ASGI).
"""
