"""The README.md of a kit: plain text that says what it is and what to type."""

from __future__ import annotations

import textwrap

from edgelm.bundle import Bundle
from edgelm.kit.parts import Parts
from edgelm.sizes import format_size
from edgelm.system.platforms import Platform
from edgelm.version import __version__


def readme(bundle: Bundle, platform: Platform, parts: Parts) -> str:
    """Return the text; commands are indented by four spaces."""
    manifest = bundle.manifest
    windows = platform.name.startswith("windows-")
    lines = [
        f"# {manifest.model.name}, {manifest.recipe.name}, for {platform.name}",
        f"A kit made by EdgeLM {__version__}: a quantised language model ({format_size(bundle.size)}), and all that is "
        f"needed to run it on {platform.name}. No network is needed.",
        "Check this machine: does it compute what the PyTorch reference computed?",
        f"    {parts.check}",
        "Exit code 0: every check of the parity test passed. Otherwise it says what is wrong.",
        *(_c_lines(windows) if parts.c else _python_lines(parts, windows)),
    ]
    if manifest.target == "tensorrt":
        lines.append(
            "It needs an NVIDIA GPU with its driver. On a Jetson these, CUDA and TensorRT come with JetPack; they are "
            "not in the kit."
        )
    lines += [
        "## What is in it",
        "- bundle/: the model, its tokenizer, and the results of the reference that the check compares with",
        "- libedgelm/: the C library with its headers, ONNX Runtime, and the program edgelm-parity"
        if parts.c
        else "- wheels/: the Python packages, which the check unpacks to env/ in this folder",
        "- SHA256SUMS: the hash of every file. To check them by hand:",
        f"    {_by_hand(platform)}",
    ]
    return "\n\n".join(_wrapped(line) for line in lines).replace("\n\n- ", "\n- ") + "\n"


def _wrapped(line: str) -> str:
    indent = "  " if line.startswith("- ") else ""
    return line if line.startswith("    ") else textwrap.fill(line, 100, subsequent_indent=indent)


def _by_hand(platform: Platform) -> str:
    system = platform.name.partition("-")[0]
    return {
        "linux": "sha256sum -c SHA256SUMS",
        "macos": "shasum -a 256 -c SHA256SUMS",
        "windows": "certutil -hashfile FILE SHA256",
    }[system]


def _python_lines(parts: Parts, windows: bool) -> list[str]:
    program = "edgelm.cmd" if windows else "./edgelm"
    names = sorted({wheel.removeprefix("wheels/").partition("-")[0] for wheel in _first(parts)})
    return [
        f"It needs Python {' or '.join(parts.pythons)}, without pip and without further packages. The check writes the "
        f"program {program} into this folder:",
        f'    {program} run bundle "Once upon a time"',
        "To use the model from your own Python, install the packages into its environment:",
        f"    pip install --no-index --no-deps --find-links wheels {' '.join(names)}",
    ]


def _first(parts: Parts) -> list[str]:
    wheels: list[str] = next(iter(parts.pythons.values()))["wheels"]
    return wheels


def _c_lines(windows: bool) -> list[str]:
    needs = "PowerShell" if windows else "a shell and sha256sum or shasum"
    return [f"It needs {needs}, and no Python. What your own program needs is in libedgelm/."]
