"""Says which extra a verb needs, instead of a bare ImportError."""

from __future__ import annotations

import importlib.util

from edgelm.errors import EdgeLMError
from edgelm.installing import install_hint

EXPORT_PACKAGES = ("torch", "onnx", "huggingface_hub")
"""Files of safetensors we read and write ourselves."""


def need_export_extra() -> None:
    """Check that the packages of the extra `export` are installed.

    Raises:
        EdgeLMError: names what is missing and how to install it.
    """
    missing = [name for name in EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EdgeLMError(
            f"this needs {', '.join(missing)}, which a run-only install leaves out: {install_hint('export')}"
        )


def need_eval_extra() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        EdgeLMError: it is not; says how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EdgeLMError(f"this needs lm-evaluation-harness: {install_hint('eval')}")
