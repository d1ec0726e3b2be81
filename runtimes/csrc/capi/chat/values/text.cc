#include "capi/chat/values/text.h"

#include <cmath>
#include <cstdio>

#include "capi/chat/values/operations.h"
#include "capi/common/json.h"
#include "capi/common/unicode.h"

namespace edgelm::capi::chat {

std::size_t count_characters(std::string_view text) {
  std::size_t count = 0;
  for (const char letter : text) count += (letter & 0xC0) != 0x80;
  return count;
}

std::size_t byte_of(const Text& text, std::size_t character) {
  if (character >= text.length()) return text.bytes.size();
  if (text.ascii()) return character;
  limits().copy(text.bytes.size());
  std::size_t at = 0;
  for (; character > 0; --character) next_character(text.bytes, at);
  return at;
}

std::string character_at(const Text& text, std::size_t character) {
  const std::size_t at = byte_of(text, character);
  std::size_t end = at;
  next_character(text.bytes, end);
  return text.bytes.substr(at, end - at);
}

std::string sliced(const Text& text, std::int64_t start, std::int64_t stop, std::int64_t step) {
  const Range range(start, stop, step);
  const auto count = range.size();
  if (count == 0) return "";
  limits().copy(text.bytes.size());
  if (step == 1) {
    const std::size_t from = byte_of(text, static_cast<std::size_t>(start));
    return text.bytes.substr(from, byte_of(text, static_cast<std::size_t>(stop)) - from);
  }
  limits().step(static_cast<std::size_t>(count));
  std::string result;
  if (text.ascii()) {
    for (std::int64_t i = 0; i < count; ++i) result += text.bytes[static_cast<std::size_t>(start + i * step)];
    return result;
  }
  limits().check(text.length() * 8);
  const std::u32string characters = to_characters(text.bytes);
  for (std::int64_t i = 0; i < count; ++i) append_utf8(result, characters[static_cast<std::size_t>(start + i * step)]);
  return result;
}

char32_t previous_character(std::string_view text, std::size_t& at) {
  do --at;
  while (at > 0 && (text[at] & 0xC0) == 0x80);
  std::size_t from = at;
  return next_character(text, from);
}

std::string_view stripped(std::string_view text, bool left, bool right) {
  std::size_t begin = 0, end = text.size();
  while (left && begin < end) {
    std::size_t after = begin;
    if (!is_python_space(next_character(text, after))) break;
    begin = after;
  }
  while (right && end > begin) {
    std::size_t before = end;
    if (!is_python_space(previous_character(text, before))) break;
    end = before;
  }
  return text.substr(begin, end - begin);
}

std::string repr_of_text(std::string_view text) {
  const char quote = text.find('\'') != text.npos && text.find('"') == text.npos ? '"' : '\'';
  std::string result(1, quote);
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t from = at;
    const char32_t character = next_character(text, at);
    if (character == static_cast<unsigned char>(quote) || character == '\\') {
      result += '\\';
      result += static_cast<char>(character);
    } else if (character == '\n' || character == '\r' || character == '\t') {
      result += character == '\n' ? "\\n" : character == '\r' ? "\\r" : "\\t";
    } else if (character < 0x20 || character == 0x7F || (character > 0x7F && !is_printable(character))) {
      char escape[16];
      const char* form = character < 0x100 ? "\\x%02x" : character < 0x10000 ? "\\u%04x" : "\\U%08x";
      std::snprintf(escape, sizeof escape, form, static_cast<unsigned>(character));
      result += escape;
    } else {
      result += text.substr(from, at - from);
    }
  }
  return result += quote;
}

namespace {

void write_items(Writer& out, const Value& value) {
  const Level level;
  const std::vector<Value>& items = value.items();
  out.add(value.is(Type::kList) ? "[" : "(");
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out.add(", ");
    write_repr(out, items[i]);
  }
  out.add(value.is(Type::kList) ? "]" : items.size() == 1 ? ",)" : ")");
}

void write_dict(Writer& out, const Dict& dict) {
  const Level level;
  out.add("{");
  bool first = true;
  for (const auto& [key, item] : dict.entries) {
    if (!first) out.add(", ");
    write_repr(out, key);
    out.add(": ");
    write_repr(out, item);
    first = false;
  }
  out.add("}");
}

void write_view(Writer& out, const View& view) {
  const Level level;
  out.add(view.kind == View::kKeys ? "dict_keys([" : view.kind == View::kValues ? "dict_values([" : "dict_items([");
  for (std::size_t i = 0; i < view.size(); ++i) {
    if (i > 0) out.add(", ");
    write_repr(out, view.at(i));
  }
  out.add("])");
}

void write_range(Writer& out, const Range& range) {
  out.add(concat("range(", range.start, ", ", range.stop));
  out.add(range.step == 1 ? ")" : concat(", ", range.step, ")"));
}

}  // namespace

void write_repr(Writer& out, const Value& value) {
  limits().step();
  switch (value.type()) {
    case Type::kString:
      if (value.as<Text>()->markup) unsupported("the repr of a text that the filters escape or safe made");
      limits().copy(value.string().size() * 8);
      out.add(repr_of_text(value.string()));
      return;
    case Type::kUndefined: out.add("Undefined"); return;
    default: write_text(out, value);
  }
}

void write_text(Writer& out, const Value& value) {
  switch (value.type()) {
    case Type::kNone: out.add("None"); return;
    case Type::kBool: out.add(value.boolean() ? "True" : "False"); return;
    case Type::kInt: out.add(std::to_string(value.integer())); return;
    case Type::kFloat: out.add(python_repr(value.real())); return;
    case Type::kString: out.add(value.string()); return;
    case Type::kList:
    case Type::kTuple: return write_items(out, value);
    case Type::kDict: return write_dict(out, *value.as<Dict>());
    case Type::kRange: return write_range(out, *value.as<Range>());
    case Type::kView: return write_view(out, *value.as<View>());
    case Type::kIterator:
      unsupported("the text of a generator, as the filters map and select return; add the filter list");
    case Type::kUndefined: return;
    case Type::kNamespace:
      out.add("<Namespace ");
      write_dict(out, *value.as<Namespace>()->attributes.as<Dict>());
      out.add(">");
      return;
    case Type::kOther: out.add(value.as<Other>()->text()); return;
  }
}

std::string text_of_value(const Value& value) {
  if (value.is_string()) return value.string();
  Writer out;
  write_text(out, value);
  return std::move(out.text);
}

std::string repr_of(const Value& value) {
  Writer out;
  write_repr(out, value);
  return std::move(out.text);
}

std::string shown(const Value& value) {
  if (value.is_string()) return repr_of_text(sliced(*value.as<Text>(), 0, 60, 1));
  if (value.is_number() || value.is(Type::kNone)) return text_of_value(value);
  return concat("a ", type_name(value));
}

std::string escaped(std::string_view text) {
  Writer out;
  for (std::size_t at = 0; at < text.size(); ++at) {
    const std::size_t end = std::min(text.find_first_of("&<>'\"", at), text.size());
    out.add(text.substr(at, end - at));
    if (end == text.size()) break;
    const char letter = text[end];
    out.add(letter == '&'    ? "&amp;"
            : letter == '<'  ? "&lt;"
            : letter == '>'  ? "&gt;"
            : letter == '\'' ? "&#39;"
                             : "&#34;");
    at = end;
  }
  return std::move(out.text);
}

}  // namespace edgelm::capi::chat
