"""Options of TensorRT engines."""

from __future__ import annotations

from dataclasses import dataclass

from edgelm.errors import ExportError

PLUGIN, ENGINE = "plugin", "engine"
IMPLEMENTATIONS = (ENGINE, PLUGIN)


@dataclass(frozen=True)
class EngineOptions:
    """Options of TensorRT engines, for the target "tensorrt" only.

    Attributes:
        matmul: Implementation of matmuls inside the engine: "engine" for TensorRT's own where it has one
            (`edgelm.export.tensorrt.linear`), "plugin" for ours.
        attention: Implementation of attention inside the engine: "plugin" for ours, "engine" for TensorRT's own
            (`edgelm.export.tensorrt.attention`).
        build: Whether to build engines at export. None builds them if TensorRT is installed.
        max_batch: Largest number of sequences that decode together.
        chunk: Largest number of tokens in a prefill step.
        weight_streaming: Build engines that can keep weights in host memory.
        embed_plugins: Store the library of plugins in engines too.

    Raises:
        ExportError: `matmul` or `attention` is not one of those values.
    """

    matmul: str = ENGINE
    attention: str = PLUGIN
    build: bool | None = None
    max_batch: int = 32
    chunk: int = 512
    weight_streaming: bool = False
    embed_plugins: bool = False

    def __post_init__(self) -> None:
        for name in ("matmul", "attention"):
            if getattr(self, name) not in IMPLEMENTATIONS:
                raise ExportError(f"{name} is {getattr(self, name)!r}: it can be {' or '.join(IMPLEMENTATIONS)}")
