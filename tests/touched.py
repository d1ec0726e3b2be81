"""Count the files that must change to add a model, scheme, runtime or verb, and the lines of code.

    python tests/touched.py [FOLDER]

FOLDER: another checkout to count; default: this one. A file counts if its code (without comments and docstrings) names
an existing model, scheme, runtime or verb, or asks which one it is, outside the files where that is expected. Lines are
those of the package without tests.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("edgelm", "quant", "export", "runtimes")
CPP = {".cc", ".cpp", ".h", ".cuh", ".cu"}

_MODELS = r"edgelm/models/(?!fields|config_fields|unsupported_fields|hooks|kv_cache|layer|matmul|parts|rope|spec)"
_RUNTIMES = r"runtimes/(__init__|registry)\.py|runtimes/(cuda|tensorrt|onnxruntime)"
KINDS = {
    "model, by name": (r"olmoe|fox|llama(?!3)", _MODELS),
    "model, by its family": (r"\bfamily\b|\bfamily_of\b|\bmodel_type\b|config_class|module_class", _MODELS),
    "model, by names of weights": (r"self_attn|mlp\.|_proj\b|layernorm|\bexperts\.|embed_tokens|lm_head", _MODELS),
    "model, by asking for experts": (r"num_experts|has_router", _MODELS),
    "scheme, by its class": (r"\bFp8Scheme\b|\bFP8_FORMS\b|\bINTEGER_BITS\b", r"quant/(scheme|recipe|fp8)\.py"),
    "runtime, by name": (r"[\"'](onnxruntime-cpu|onnxruntime-cuda|cuda-kernels|cuda-emulated)[\"']", _RUNTIMES),
    "runtime, by its modules": (r"edgelm\.runtimes\.(cuda|tensorrt|onnxruntime|native)", _RUNTIMES),
    "verb": (
        r"[\"'](bench|build|chat|demo|doctor|eval|harness|inspect|install|quantize|recipe|synth)[\"']",
        r"(?!edgelm/cli/)|edgelm/cli/(?!main|common)",
    ),
}
"""For each kind of addition: patterns of code that names it, and the files where that is expected."""


def main() -> None:
    """Print both tables."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    code = {path.relative_to(root).as_posix(): "\n".join(_code(path)) for path in sorted(_sources(root, {".py"}))}
    for kind, (pattern, home) in KINDS.items():
        found = {path: len(re.findall(pattern, text)) for path, text in code.items() if not re.match(home, path)}
        named = {path: count for path, count in found.items() if count}
        print(f"{kind}: {len(named)} files, {sum(named.values())} times")
        for path, count in named.items():
            print(f"    {count:3} {path}")
    lines: Counter[tuple[str, str]] = Counter()
    for language, suffixes in (("Python", {".py"}), ("C++ and CUDA", CPP)):
        for path in _sources(root, suffixes):
            place = path.relative_to(root).parts
            lines[language, place[0]] += path.read_text(encoding="utf-8").count("\n")
            lines[language, "all"] += path.read_text(encoding="utf-8").count("\n")
    for (language, package), count in sorted(lines.items()):
        print(f"{language}, {package}: {count} lines")


def _sources(root: Path, suffixes: set[str]) -> Iterator[Path]:
    for folder in FOLDERS:
        for path in (root / folder).rglob("*"):
            parts = path.relative_to(root).parts
            if path.suffix in suffixes and not {"tests", "__pycache__"} & set(parts):
                yield path


def _code(path: Path) -> Iterator[str]:
    """Yield the file's lines without comments and docstrings."""
    line: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.NEWLINE:
            if not (len(line) == 1 and line[0].lstrip("rbf")[:1] in "\"'"):
                yield "".join(line)
            line = []
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            apart = line and line[-1] != "." and token.string.isidentifier()
            line.append(f" {token.string}" if apart else token.string)


if __name__ == "__main__":
    main()
