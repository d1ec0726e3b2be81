"""What an answer may look like: structured output (JSON schemas, regular expressions, grammars) and tool calls.

`grammar_for` makes a `Grammar` of a request's `response_format`; `Grammar.rule` is a `LogitsRule` for one answer. The
grammars are llguidance's. `tool_format` finds out how a model writes the calls of tools, by its chat template; a
`ToolFormat` makes the grammar that forces a call, and the parser that finds the calls in an answer. `Reasoning` is what
a model writes before its answer.
"""

from edgelm.serving.constraints.detection import require_tool_format, tool_format
from edgelm.serving.constraints.grammar import Grammar, GrammarRule
from edgelm.serving.constraints.reasoning import Reasoning, ReasoningDelta, ReasoningParser
from edgelm.serving.constraints.response_format import grammar_for
from edgelm.serving.constraints.tool_format import ToolFormat
from edgelm.serving.constraints.tool_parser import Call, CallDelta, ContentDelta, Delta, ToolParser, collect
from edgelm.serving.constraints.tools import ToolOptions
from edgelm.serving.constraints.vocabulary import GrammarTokenizer

__all__ = [
    "Call",
    "CallDelta",
    "ContentDelta",
    "Delta",
    "Grammar",
    "GrammarRule",
    "GrammarTokenizer",
    "Reasoning",
    "ReasoningDelta",
    "ReasoningParser",
    "ToolFormat",
    "ToolOptions",
    "ToolParser",
    "collect",
    "grammar_for",
    "require_tool_format",
    "tool_format",
]
