"""EdgeLM: quantise, export and run language models, and check on the device that they compute what PyTorch computes.

Example::

    import edgelm

    model = edgelm.load("bundle/")
    for text in model.stream("Once upon a time", max_tokens=64):
        print(text, end="")
    report = edgelm.check_parity("bundle/")

``import edgelm`` is fast: each public name is imported from its module when it is first used.
"""

from __future__ import annotations

from edgelm.version import __version__

# Replaces typing.TYPE_CHECKING, which is slow to import. Start-up must be fast: see `edgelm.cli.common.interrupts`.
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
