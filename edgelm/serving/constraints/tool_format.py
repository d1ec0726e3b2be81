"""Find out how a model calls tools, by its chat template, and make the grammars and parsers of its calls.

A template is tried with a tool and a conversation that calls it. What it writes for the earlier call is what the model
was trained to write, so the names of models play no part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import llguidance

from edgelm.errors import GenerationError, GenerationValueError
from edgelm.serving.constraints import json_schema
from edgelm.serving.constraints.call_syntax import CallSyntax, JsonCalls, NamedCalls, Target, json_rule
from edgelm.serving.constraints.call_xml import XmlCalls
from edgelm.serving.constraints.grammar import Grammar
from edgelm.serving.constraints.history import History
from edgelm.serving.constraints.response_format import grammar_for
from edgelm.serving.constraints.tool_parser import ToolParser
from edgelm.serving.constraints.tools import Function, ToolOptions
from edgelm.serving.constraints.vocabulary import GrammarTokenizer
from edgelm.tokenization.chat_template import ChatTemplate
from edgelm.tokenization.tokenizer import Tokenizer

_NAME, _KEY, _VALUE = "edgelm_probe", "edgelm_key", "edgelm_value"
_ID = "a1b2c3d4e"  # 9 letters and digits: Mistral's templates check that
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Return a value.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}
_USER = {"role": "user", "content": "Hello"}
_RIGHT = re.compile(rf'"{_KEY}": ?"{_VALUE}"|<parameter={_KEY}>')


@dataclass(frozen=True)
class ToolFormat:
    """How one model calls tools. Returned by `tool_format`.

    Attributes:
        syntax: how the model writes calls.
        history: how its template takes earlier calls.
        several: whether its template takes several calls in one message. If not, one call is made at a time.
    """

    syntax: CallSyntax
    history: History
    several: bool = True

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a conversation as the template takes it. See `History.messages`."""
        return self.history.messages(messages)

    def variables(self, options: ToolOptions) -> dict[str, Any]:
        """Return the variables for `ChatTemplate.render`. With the choice "none" the model sees no tools."""
        return {} if options.choice == "none" else {"tools": [dict(tool) for tool in options.tools]}

    def shown(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the special tokens that the parser needs in the text, for `LanguageModel.continuation`."""
        ids = {tokenizer.token_id(text) for text in (*self.syntax.markers, *self.syntax.ends)}
        return frozenset(index for index in ids if index is not None and index in tokenizer.special)

    def parser(self, options: ToolOptions) -> ToolParser:
        """Return a parser for one answer."""
        return ToolParser(self.syntax, options.functions, parallel=options.parallel and self.several)

    def grammar(
        self, options: ToolOptions, tokenizer: GrammarTokenizer, response_format: object = None
    ) -> Grammar | None:
        """Return the grammar of an answer; None where it is free text.

        A call that has to come follows the schemas of its function. So do calls that may come if a function is strict,
        or if `response_format` asks for JSON; the answer is then either calls or such JSON.

        Args:
            options: the request's tools.
            tokenizer: the bundle's vocabulary.
            response_format: the request's field.

        Raises:
            GenerationTypeError, GenerationValueError: a schema or `response_format` is wrong, or cannot be enforced.
        """
        if options.choice == "none":
            return grammar_for(response_format, tokenizer)
        strict = any(function.strict for function in options.functions)
        answer = None
        if options.choice == "auto":
            if grammar_for(response_format, tokenizer) is not None:
                answer = _answer(response_format)
            elif not strict:
                return None
        return self._compile(options, tokenizer, answer)

    def _compile(self, options: ToolOptions, tokenizer: GrammarTokenizer, answer: Mapping[str, Any] | None) -> Grammar:
        syntax = self.syntax
        rules: dict[str, str] = {}
        targets = []
        for i, function in enumerate(options.functions):
            rules |= syntax.arguments(f"arguments_{i}", function.parameters, _lenient(function))
            targets.append(Target(function.name, f"arguments_{i}"))
        special: list[int] = []

        def terminal(marker: str) -> str:
            index = tokenizer.token_id(marker)
            if index is None:
                return json.dumps(marker, ensure_ascii=False)
            special.append(index)
            return f"<[{index}]>"

        parallel = options.parallel and self.several
        rules["call"] = syntax.after_marker(targets, terminal, parallel=parallel)
        marker = terminal(syntax.markers[0])
        if options.choice == "auto" and answer is None:
            rules = _optional(marker, syntax.bare) | rules
        else:
            one = "call" if syntax.bare else f"{marker} call"
            if parallel and syntax.between is not None:
                one += f" ({json.dumps(syntax.between)} {one})*" if syntax.between else f" ({one})*"
            rules = {"start": one if answer is None else f"answer | {one}", **rules}
            if answer is not None:
                rules["answer"] = json_rule(answer, lenient=False)
        text = "\n".join(f"{name}: {body}" for name, body in rules.items())
        return tokenizer.compile(llguidance.LLMatcher.grammar_from_lark(text), "tools", special=special)


def _optional(marker: str, bare: bool) -> dict[str, str]:
    """Return the rules of a text that may have calls in it."""
    if bare:  # the model begins with a brace to call a function, and with anything else to answer
        return {"start": f"TEXT | {marker}? call |", "TEXT": r"/\s*[^{\s](.|\n)*/"}
    text = {"TEXT": r"/(.|\n)*/"}
    if marker.startswith("<"):  # a special token
        return {"start": f"(TEXT {marker} call)* TEXT", **text}
    return {"start": "(head call)* TEXT", "head[lazy]": f"TEXT {marker}", **text}


def _lenient(function: Function) -> bool:
    """Return whether keywords of a function's schema have to be ignored.

    Raises:
        GenerationValueError: the function is strict, or its schema is wrong.
    """
    where = f"{function.where}.parameters"
    try:
        json_schema.grammar_text(function.parameters, where)
    except GenerationValueError:
        if function.strict:
            raise
        json_schema.grammar_text(function.parameters, where, lenient=True)
        return True
    return False


def _answer(response_format: Any) -> Mapping[str, Any]:
    """Return the JSON schema of an answer."""
    kind = response_format["type"]
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        schema: Mapping[str, Any] = response_format["json_schema"]["schema"]
        return schema
    raise GenerationValueError(
        f'response_format of the type "{kind}" cannot be combined with tools that the model may call: set tool_choice'
    )


def tool_format(template: ChatTemplate) -> ToolFormat | None:
    """Return how a model calls tools, by its chat template; None if the template has no tools.

    Raises:
        GenerationValueError: the template shows tools, but how the model writes calls is not known here.
    """
    try:
        prompt = template.render([_USER], variables={"tools": [_TOOL]})
    except GenerationError:
        return None
    if _NAME not in prompt:
        return None
    history, earlier, several = _try_history(template)
    for text in (earlier, prompt, template.source):
        syntax = _syntax(text)
        if syntax is not None:
            return ToolFormat(syntax, replace(history, short_ids=syntax.short_ids), several)
    raise GenerationValueError(
        "the model's chat template shows tools, but it is not known how the model writes calls: leave out tools, and "
        f"ask for JSON in the prompt. Known are: {', '.join(_KNOWN)}"
    )


def require_tool_format(template: ChatTemplate, model: str) -> ToolFormat:
    """Return `tool_format`.

    Args:
        template: the chat template.
        model: the model's name, for the message.

    Raises:
        GenerationValueError: the template has no tools, or an unknown way to call them.
    """
    found = tool_format(template)
    if found is None:
        raise GenerationValueError(
            f"tools cannot be used with {model}: its chat template does not show them to the model. Leave out tools, "
            "or choose a model that was trained to call them"
        )
    return found


def _try_history(template: ChatTemplate) -> tuple[History, str, bool]:
    """Return how the template takes earlier calls, what it writes for one, and whether it takes two in one message.

    The text is empty if the template refuses them, or writes nothing.
    """
    for history in (History(), History(empty_content=True), History(text=True), History(text=True, empty_content=True)):
        text = _rendered(template, history, calls=1)
        places = [found.start() for found in _RIGHT.finditer(text)]
        if places:
            return history, text[max(places[-1] - 200, 0) :], bool(_rendered(template, history, calls=2))
    return History(), "", True


def _rendered(template: ChatTemplate, history: History, calls: int) -> str:
    """Return a conversation with a number of calls; an empty text if the template refuses it."""
    ids = [_ID[:-1] + str(i) for i in range(calls)]
    function = {"name": _NAME, "arguments": json.dumps({_KEY: _VALUE})}
    tool_calls = [{"id": index, "type": "function", "function": function} for index in ids]
    conversation: list[dict[str, Any]] = [_USER, {"role": "assistant", "content": None, "tool_calls": tool_calls}]
    conversation += [{"role": "tool", "tool_call_id": index, "content": "42"} for index in ids]
    try:
        return template.render(history.messages(conversation), variables={"tools": [_TOOL]})
    except GenerationError:
        return ""


_KNOWN = ("hermes", "qwen3-coder", "llama", "mistral", "granite", "phi")


def _syntax(text: str) -> CallSyntax | None:
    """Return how calls are written in a text: what a template wrote for a call, or what it says about calls."""
    if re.search(r"<tool_call>\s*<function=", text):
        return XmlCalls()
    if "[TOOL_CALLS]" in text:
        if "[ARGS]" in text:
            return NamedCalls()
        space = " " if "[TOOL_CALLS] [" in text else ""
        return JsonCalls("mistral", "[TOOL_CALLS]", array=True, space=space, short_ids=True)
    if "<tool_call>" in text:
        space = "" if re.search(r'<tool_call>\{"name"', text) else "\n"
        return JsonCalls("hermes", "<tool_call>", "</tool_call>", space=space, between="\n")
    if "<|tool_call|>" in text:
        end = "<|/tool_call|>" if "<|/tool_call|>" in text else ""
        return JsonCalls("phi" if end else "granite", "<|tool_call|>", end, array=True)
    found = re.search(rf'"name": ?"{_NAME}", ?"(parameters|arguments)":', text)
    if found:
        return JsonCalls("llama", "<|python_tag|>", key=found[1], bare=True)
    return None
