// Tokens of a template, as jinja2 finds them with trim_blocks and lstrip_blocks.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace edgelm::capi::chat {

struct Token {
  enum Kind {
    kData,
    kBlockBegin,
    kBlockEnd,
    kVariableBegin,
    kVariableEnd,
    kName,
    kString,
    kInteger,
    kFloat,
    kOperator,
    kEnd
  };
  Kind kind;
  int line;
  std::string text;  // of a string: its value
};

// Throws Failure for what is no template. `source` is valid UTF-8.
std::vector<Token> tokens_of(std::string_view source);

// "line 3: ": the beginning of a message about the source.
std::string at_line(int line);

}  // namespace edgelm::capi::chat
