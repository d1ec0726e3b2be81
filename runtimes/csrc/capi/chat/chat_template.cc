#include "capi/chat/chat_template.h"

#include <new>

#include "capi/chat/messages.h"
#include "capi/chat/render/interpreter.h"
#include "capi/chat/syntax/tree.h"
#include "capi/chat/values/text.h"
#include "capi/common/unicode.h"

namespace edgelm::capi {

using chat::Failure;

struct ChatTemplate::Program { std::unique_ptr<const chat::Tree> tree; };

namespace {

constexpr std::size_t kMaxSource = 1u << 20;  // bytes, as in template_files.py

// A template's message for a terminal: one line, no control characters, at most 300 characters.
std::string one_line(std::string_view text) {
  std::string line;
  std::size_t count = 0;
  bool space = false;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t from = at;
    const char32_t character = next_character(text, at);
    if (is_python_space(character) || !is_printable(character)) {
      space = !line.empty();
      continue;
    }
    count += 1 + space;
    if (count > 300) return line + "...";
    if (space) line += ' ';
    space = false;
    line += text.substr(from, at - from);
  }
  return line;
}

std::string reason(const Failure& failure, int line) {
  const std::string said = one_line(failure.message);
  switch (failure.kind) {
    case Failure::kInvalid: return "is not valid: " + said;
    case Failure::kRefused: return "refuses these messages: " + said;
    case Failure::kForbidden: return "tries what a template may not: " + said + "; do not trust it";
    case Failure::kLimit: return "does more than a chat template may: " + said;
    case Failure::kUnsupported:
      return concat("uses what this library does not support: ", line > 0 ? concat("line ", line, ": ") : "", said,
                    "; see chat templates in the docs");
    default: return "fails on these messages: " + said;
  }
}

[[noreturn]] void fail_with(const Failure& failure, int line = 0) {
  fail(EDGELM_TEMPLATE, "chat template ", reason(failure, line));
}

chat::Value to_value(const Json& json) {
  if (json.is_null()) return {};
  if (json.is_bool()) return json.boolean();
  if (json.is_integer()) return json.integer();
  if (json.is_double()) return json.number();
  if (json.is_string()) return json.string();
  if (json.is_array()) {
    chat::Collector items;
    for (const Json& item : json.array()) items.add(to_value(item));
    return make_list(std::move(items.values));
  }
  chat::Value result = chat::make_dict();
  for (const auto& [key, item] : json.object()) result.as<chat::Dict>()->set(chat::Value(key), to_value(item));
  return result;
}

}  // namespace

ChatTemplate::ChatTemplate(const std::string& source, std::vector<std::pair<std::string, std::string>> special)
    : special_(std::move(special)) {
  if (source.size() > kMaxSource) {
    fail(EDGELM_TEMPLATE, "chat template has ", source.size(), " bytes, more than the limit of ", kMaxSource);
  }
  if (valid_utf8_prefix(source) != source.size()) fail(EDGELM_TEMPLATE, "chat template is not valid UTF-8");
  chat::Limits limits;
  const chat::LimitsScope scope(limits);
  try {
    program_ = std::make_unique<const Program>(Program{chat::parse(source)});
  } catch (const Failure& failure) {
    fail_with(failure);
  }
}

ChatTemplate::~ChatTemplate() = default;

std::string ChatTemplate::render(const Json& messages, bool add_generation_prompt, const Json& variables) const {
  const Json checked = chat::checked_messages(messages, !program_->tree->reads_parts);
  if (!variables.is_null() && !variables.is_object()) {
    fail(EDGELM_INVALID_ARGUMENT, "variables of a chat template must be an object");
  }
  chat::Limits limits;
  const chat::LimitsScope scope(limits);
  std::unique_ptr<chat::Interpreter> interpreter;
  try {
    const chat::Value given = chat::make_dict();
    chat::Dict& dict = *given.as<chat::Dict>();
    for (const char* name : {"tools", "documents"}) dict.set(chat::Value(name), {});
    for (const auto& [name, text] : special_) dict.set(chat::Value(name), chat::Value(text));
    if (variables.is_object()) {
      for (const auto& [name, value] : variables.object()) dict.set(chat::Value(name), to_value(value));
    }
    dict.set(chat::Value("messages"), to_value(checked));
    dict.set(chat::Value("add_generation_prompt"), chat::Value(add_generation_prompt));
    interpreter = std::make_unique<chat::Interpreter>(*program_->tree, given);
    return interpreter->run();
  } catch (const Failure& failure) {
    fail_with(failure, interpreter == nullptr ? 0 : interpreter->line());
  } catch (const std::bad_alloc&) {
    fail_with(Failure(Failure::kLimit, "more memory than there is"));
  }
}

}  // namespace edgelm::capi
