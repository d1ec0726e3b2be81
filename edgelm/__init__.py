"""OLMoE and Fox-1 on edge devices: quantise, export, run, and prove that the device computes what PyTorch computes.

    import edgelm
    model = edgelm.load("bundle/")
    for piece in model.stream("Once upon a time", max_tokens=64):
        print(piece, end="")
    report = edgelm.check_parity("bundle/")

Importing this package imports nothing heavy: each name below is fetched from its module when it is first used.
"""

from __future__ import annotations

from edgelm.version import __version__

# As typing.TYPE_CHECKING, which takes a while to import: `edgelm.cli.common.interrupts` says why that matters.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from edgelm.bundle import Bundle as Bundle
    from edgelm.errors import EdgeLMError as EdgeLMError
    from edgelm.generation.language_model import LanguageModel as LanguageModel
    from edgelm.generation.language_model import load as load
    from edgelm.generation.options import GenerateOptions as GenerateOptions
    from edgelm.generation.stream import Generation as Generation
    from edgelm.generation.stream import TextStream as TextStream
    from edgelm.parity.check import check_parity as check_parity

_WHERE = {
    "Bundle": "edgelm.bundle",
    "EdgeLMError": "edgelm.errors",
    "GenerateOptions": "edgelm.generation.options",
    "Generation": "edgelm.generation.stream",
    "LanguageModel": "edgelm.generation.language_model",
    "TextStream": "edgelm.generation.stream",
    "check_parity": "edgelm.parity.check",
    "load": "edgelm.generation.language_model",
}
__all__ = [
    "Bundle", "EdgeLMError", "GenerateOptions", "Generation", "LanguageModel", "TextStream", "__version__",
    "check_parity", "load",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
