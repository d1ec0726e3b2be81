"""What a caller can choose of TensorRT's engines."""

from __future__ import annotations

from dataclasses import dataclass

from edgelm.errors import ExportError

PLUGIN, ENGINE = "plugin", "engine"
WHO = (ENGINE, PLUGIN)


@dataclass(frozen=True)
class EngineOptions:
    """How engines are to be made; all of it is about `--target tensorrt`.

    Attributes:
        matmul: "engine": TensorRT's own matmuls where it has them, see `tensorrt.linear`; "plugin": ours.
        attention: "plugin": ours; "engine": TensorRT's own, see `tensorrt.attention`.
        build: whether to build engines now, as far as the installed TensorRT can; None: if there is one.
        max_batch, chunk, weight_streaming: see `edgelm.runtimes.tensorrt.builder.BuildOptions`.
    """

    matmul: str = ENGINE
    attention: str = PLUGIN
    build: bool | None = None
    max_batch: int = 32
    chunk: int = 512
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        for name in ("matmul", "attention"):
            if getattr(self, name) not in WHO:
                raise ExportError(f"{name} is {getattr(self, name)!r}: it can be {' or '.join(WHO)}")
