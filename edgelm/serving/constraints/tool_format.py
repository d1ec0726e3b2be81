"""How one model calls tools: grammars and parsers of its calls, and earlier calls for its chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance

from edgelm.errors import GenerationValueError
from edgelm.serving.constraints import json_schema
from edgelm.serving.constraints.call_syntax import CallSyntax, Target, json_rule
from edgelm.serving.constraints.grammar import Grammar
from edgelm.serving.constraints.history import History
from edgelm.serving.constraints.response_format import grammar_for
from edgelm.serving.constraints.tool_parser import ToolParser
from edgelm.serving.constraints.tools import Function, ToolOptions
from edgelm.serving.constraints.vocabulary import GrammarTokenizer, special_ids
from edgelm.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolFormat:
    """How one model calls tools. Returned by `detection.tool_format`.

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
        return special_ids((*self.syntax.markers, *self.syntax.ends), tokenizer)

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
