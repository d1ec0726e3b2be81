"""Program that renders chat templates in a process with limits. `template_sandbox` starts it.

    python -I -S template_worker.py MEMORY SECONDS CHARACTERS FOLDER...

MEMORY: bytes of address space. SECONDS: CPU time of one rendering. CHARACTERS: length of one rendered text. FOLDER: the
folders of jinja2 and markupsafe. The program imports nothing of EdgeLM, so that it starts quickly.

It reads requests from standard input until its end, and writes answers to standard output. A message is its length (4
bytes, big endian) and that many bytes. The program first sends an empty message when it is ready. A request is JSON:
`source` is the template, and `given` its variables, or null to check the template only. An answer is one letter and a
text, see `Answer`.

The operating system limits memory; CPU time, after which it ends the process even inside C code; files: none can be
opened or written; and processes: none can be started (except by root). Windows has none of these limits, macOS none on
memory.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template, nodes


class Answer:
    """First letters of answers. The comments say what the text after them is."""

    DONE = b"d"  # the rendered text; empty after a check
    INVALID = b"i"  # why the source is not a template
    REFUSED = b"r"  # the template's own error about the messages
    FORBIDDEN = b"f"  # the forbidden operation that it tried
    FAILED = b"e"  # the error that one of its expressions raised
    LIMIT = b"l"  # the limit that it exceeded


# jinja2 and Python would import these when they are first needed, but then files can no longer be opened.
_LATE = (
    "jinja2.constants", "jinja2.debug", "html", "pprint", "textwrap", "unicodedata",
    "encodings.ascii", "encodings.latin_1", "encodings.unicode_escape",
)  # fmt: skip


def _environment() -> Any:
    """Return an environment like that of `transformers.utils.chat_template_utils`, for which templates are written."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks the assistant's part for training; it does not change the text."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block, as in transformers: variables set inside are not visible outside.
            return nodes.CallBlock(self.call_method("_pass"), [], [], body).set_lineno(line)

        def _pass(self, caller: Any) -> Any:
            return caller()

    class Dict:
        """`dict` without the attributes of the class."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class PlainNamespace(Namespace):
        """A namespace that refuses names that begin with `_`."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args  # so that `namespace(self=1)` works, as in jinja2
            values = dict(*rest, **kwargs)
            for name in values:
                _check_name(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}")

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # jinja2's own filter escapes <, > and & for HTML, which models were not trained on.
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:  # noqa: A002 - the name that templates may use
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dict(),
        "namespace": PlainNamespace,
    }
    return environment


def _reads_parts(tree: nodes.Template) -> bool:
    """Return whether the template loops over the parts of a message's content instead of using it as a string.

    Looks for a loop over `x.content`, or over a variable or macro argument to which it was assigned.
    """
    from jinja2 import nodes

    names: set[str] = set()

    def is_content(node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Filter | nodes.Test):
            return is_content(node.node)
        if isinstance(node, nodes.CondExpr):
            return is_content(node.expr1) or is_content(node.expr2)
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            if isinstance(node.arg, nodes.Slice):
                return is_content(node.node)
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Name) and node.name in names

    assigned = list(tree.find_all(nodes.Assign))
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    calls = [
        (macros[call.node.name], call)
        for call in tree.find_all(nodes.Call)
        if isinstance(call.node, nodes.Name) and call.node.name in macros
    ]
    found = -1
    while found != len(names):  # repeat, since a variable may be assigned to another one
        found = len(names)
        names |= {a.target.name for a in assigned if isinstance(a.target, nodes.Name) and is_content(a.node)}
        for macro, call in calls:
            names |= {name.name for name, value in zip(macro.args, call.args, strict=False) if is_content(value)}
            names |= {keyword.key for keyword in call.kwargs if is_content(keyword.value)}
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    parts = message.get("content")
    if (
        not isinstance(parts, list)
        or not parts
        or not all(isinstance(p, dict) and p.get("type") == "text" for p in parts)
    ):
        return message
    return message | {"content": "\n".join(part["text"] for part in parts)}


class _Compiled:
    """A compiled template."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._environment = _environment()
        self.template: Template = self._environment.from_string(source)
        self._parts: bool | None = None

    def adapt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages; if the template expects strings, lists of text parts are joined to strings."""
        if not any(isinstance(message.get("content"), list) for message in messages):
            return messages
        if self._parts is None:
            self._parts = _reads_parts(self._environment.parse(self.source))
        return messages if self._parts else [_flat(message) for message in messages]


class Renderer:
    """Answers requests. Only the last template is kept, so that the memory of earlier ones is freed."""

    def __init__(self, characters: int) -> None:
        self._characters = characters
        self._compiled: _Compiled | None = None

    def answer(self, body: bytes) -> bytes:
        """Return the answer to a request: a letter and a text."""
        try:
            letter, text = self._answer(json.loads(body.decode("utf-8", "surrogatepass")))
            return letter + (text if letter == Answer.DONE else text[:1000]).encode("utf-8", "surrogatepass")
        except MemoryError:
            return Answer.LIMIT + b"more memory than it may have"
        except RecursionError:
            return Answer.LIMIT + b"recursion without end"

    def _answer(self, request: Mapping[str, Any]) -> tuple[bytes, str]:
        from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError

        try:
            compiled = self._compile(request["source"])
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # the compiler may raise anything for an invalid template
            return Answer.INVALID, str(error)
        if request["given"] is None:
            return Answer.DONE, ""
        try:
            return self._render(compiled, request["given"])
        except (MemoryError, RecursionError):
            raise
        except SecurityError as error:
            return Answer.FORBIDDEN, str(error)
        except TemplateError as error:
            return Answer.FAILED if isinstance(error, TemplateRuntimeError) else Answer.REFUSED, str(error)
        except Exception as error:  # the template's expressions may raise anything
            return Answer.FAILED, f"{type(error).__name__}: {error}"

    def _compile(self, source: str) -> _Compiled:
        if self._compiled is None or self._compiled.source != source:
            self._compiled = None
            self._compiled = _Compiled(source)
        return self._compiled

    def _render(self, compiled: _Compiled, given: dict[str, Any]) -> tuple[bytes, str]:
        given["messages"] = compiled.adapt(given["messages"])
        parts: list[str] = []
        length = 0
        for part in compiled.template.generate(given):
            length += len(part)
            if length > self._characters:
                return Answer.LIMIT, f"more than {self._characters} characters"
            parts.append(part)
        return Answer.DONE, "".join(parts)


def _set_limits(memory: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {"RLIMIT_AS": memory, "RLIMIT_DATA": memory, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0}
    # File descriptors begin at 0, and three are open: no more can be opened.
    for name, limit in {**limits, "RLIMIT_NOFILE": 3}.items():
        if hasattr(resource, name):
            try:
                resource.setrlimit(getattr(resource, name), (limit, limit))
            except (OSError, ValueError):  # not supported here, such as RLIMIT_AS on macOS
                continue


def _set_clock(seconds: float) -> None:
    """Let the system end this process after `seconds` more of CPU time; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _requests() -> Iterator[bytes]:
    while len(head := sys.stdin.buffer.read(4)) == 4:
        length = int.from_bytes(head, "big")
        body = sys.stdin.buffer.read(length)
        if len(body) < length:
            return
        yield body


def _send(body: bytes) -> None:
    sys.stdout.buffer.write(len(body).to_bytes(4, "big"))
    sys.stdout.buffer.write(body)
    sys.stdout.buffer.flush()


def main() -> None:
    """Serve until standard input ends."""
    # Ctrl-C in a terminal is handled by the parent process, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGPROF"):  # signal of `_set_clock`; the parent may ignore or block it, which is inherited
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    memory, seconds, characters = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    sys.path += sys.argv[4:]
    for name in _LATE:
        __import__(name)
    datetime.now().strftime("%c")  # reads the time zone file while files can be opened
    renderer = Renderer(characters)
    _environment()
    _set_limits(memory)
    _send(b"")
    for request in _requests():
        _set_clock(seconds)
        answer = renderer.answer(request)
        _set_clock(0)
        _send(answer)


if __name__ == "__main__":
    main()
    os._exit(0)
