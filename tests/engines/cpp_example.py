"""Python's side of stand_in.cc: the engine under examples/tensorrt_cpp is a bundle's program on the emulated driver."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from kernel_folders import compiled
from played import Place, PlayedEngine, PlayedGraph

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "tensorrt_cpp"
TYPES = {1: 2, 4: 3}
"""TensorRT's number of int8 and int32 by bytes per element."""
FLOAT = 0
MOST_POSITIONS, CHUNK, SCRATCH = 128, 4, 1000
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int64)
)


def compile_example(folder: Path) -> ctypes.CDLL:
    """Compile the example with its stand-in for TensorRT to a library, whose program is `example_main`."""
    options = ["-shared", "-fPIC", "-Dmain=example_main", "-I", HERE / "declarations"]
    return ctypes.CDLL(
        str(compiled("c++", [*options, EXAMPLE / "generate.cc", HERE / "stand_in.cc"], folder / "example.so"))
    )


class Program:
    """The example with an engine. Its output goes to the process's own.

    Args:
        library: that of `compile_example`.
        graph: what the engine computes; None: nothing, in a run that fails before.
        capturable: whether decoding can be captured as a CUDA graph.
        refused: name of a call that fails.
        message: what TensorRT's log says of it.
    """

    def __init__(
        self, library: ctypes.CDLL, graph: PlayedGraph | None = None, *, capturable: bool = True, refused: str = "",
        message: str = "",
    ) -> None:  # fmt: skip
        self._library, self._graph = library, graph
        self._bound: dict[str, Place] = {}
        self._raised: Exception | None = None
        self._callback = _CALLBACK(self._called)
        library.stand_in_calls.restype = ctypes.c_char_p
        library.stand_in(self._callback, ctypes.c_int64(SCRATCH), int(capturable), refused.encode(), message.encode())
        if graph is not None:
            self._describe(PlayedEngine(graph, None))

    def _describe(self, engine: PlayedEngine) -> None:
        vocabulary = engine.graph.model.vocab_size
        for tensor in engine.tensors:
            name = tensor.name.replace("present", "past_key_values")
            shape = (-1, 1, vocabulary) if tensor.name == "logits" else engine.input_shape(name)
            kind = FLOAT if tensor.name == "logits" else TYPES[tensor.element_bytes]
            # The largest shapes for decoding and prefill.
            tokens = {"input_ids": (1, CHUNK)}.get(name, (MOST_POSITIONS, MOST_POSITIONS))
            last = [tuple(most if i and dim < 0 else abs(dim) for i, dim in enumerate(shape)) for most in tokens]
            self._library.stand_in_tensor(
                tensor.name.encode(), int(tensor.is_input), kind, len(shape), *map(_dims, (shape, *last))
            )

    def run(self, *arguments: object) -> int:
        """Run the program; return its exit status. An error in what Python plays of the engine is raised."""
        words = [b"generate", *(str(argument).encode() for argument in arguments)]
        status = int(self._library._Z12example_mainiPPc(len(words), (ctypes.c_char_p * (len(words) + 1))(*words)))
        if self._raised is not None:
            raise self._raised
        return status

    @property
    def calls(self) -> list[str]:
        """The calls that matter, in order."""
        return str(self._library.stand_in_calls().decode()).splitlines()

    @property
    def buffers(self) -> int:
        """The number of buffers that were not freed."""
        return int(self._library.stand_in_buffers())

    def _called(self, profile: int, name: bytes | None, address: int, rank: int, dims: Sequence[int]) -> int:
        """Note a tensor of a step; without a name run the step. Return 0, or 1 for an error."""
        if name is not None:
            self._bound[name.decode()] = (address, tuple(dims[:rank]))
            return 0
        try:
            self._step()
        except Exception as error:
            self._raised = error
        return int(self._raised is not None)

    def _step(self) -> None:
        assert self._graph is not None
        bound, self._bound = self._bound, {}
        for name, place in bound.items():
            if name.startswith("present."):
                assert place[0] == bound[name.replace("present", "past_key_values")][0], name
        self._graph.run(bound, self._graph.device.stream)


def _dims(shape: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(shape))(*shape)
