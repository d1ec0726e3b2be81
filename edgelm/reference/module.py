"""The reference as a torch module with all weights in memory, for training, tests and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgelm.models.spec import Decoder
from edgelm.reference.hooks import Hooks
from edgelm.reference.interpreter import Interpreter
from edgelm.reference.kv_cache import KVCache, Trace


class ReferenceModel(nn.Module):
    """A model whose weights are torch parameters, one for each tensor of the checkpoint.

    Args:
        decoder: the model's spec.

    Attributes:
        hooks: observe or replace the inputs of matmuls, and the keys and values that are cached; None for none.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.hooks: Hooks | None = None
        for name, shape in decoder.tensor_shapes.items():
            filled = torch.ones(shape) if len(shape) == 1 else torch.empty(shape)
            self.register_parameter(_key(name), nn.Parameter(filled))

    @property
    def interpreter(self) -> Interpreter:
        """The interpreter of the model."""
        return Interpreter(self.decoder, self.read, self.hooks)

    def read(self, name: str) -> Tensor:
        """Return a weight by its tensor name."""
        return self.get_parameter(_key(name))

    def forward(self, ids: Tensor, cache: KVCache | None = None, trace: Trace | None = None) -> Tensor:
        """Return logits float32 [B, T, V] for int64 ids [B, T], which follow the tokens in the cache."""
        run, decoder = self.interpreter, self.decoder
        x = F.embedding(ids, self.read(decoder.embed.name)).float()  # [B, T, D]
        if trace is not None:
            trace.hidden.append(x)
        for index in range(decoder.num_layers):
            x = run.layer(index, x, cache, trace)
            if trace is not None:
                trace.hidden.append(x)
        return run.matmul(decoder.head, run.norm(decoder.norm, x))

    def new_cache(self) -> KVCache:
        """Return an empty KV cache for this model."""
        return KVCache(self.decoder.num_layers)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield tensor names with views of the weights in memory, in the order of the forward pass."""
        for name in self.decoder.tensor_shapes:
            yield name, self.read(name).data

    def load_weights(self, read: Callable[[str], NDArray[np.float32]]) -> None:
        """Set every weight to `read(name)`, a float32 array of the shape in `Decoder.tensor_shapes`."""
        for name, tensor in self.tensors():
            tensor.copy_(torch.from_numpy(read(name)))


def _key(name: str) -> str:
    """Return the parameter's name in torch, which does not allow dots."""
    return name.replace(".", "/")
