// The methods of strings.
#include <algorithm>

#include "capi/chat/render/call.h"
#include "capi/chat/values/text.h"
#include "capi/common/unicode.h"

namespace edgelm::capi::chat {

namespace {

using std::string_view;

Value list_of_parts(const std::vector<string_view>& parts) {
  Collector all;
  for (const string_view part : parts) all.add(Value(part));
  return make_list(std::move(all.values));
}

// Whether a character is in `set`; of a null set: whether it is a space.
bool in_set(char32_t character, const std::u32string* set) {
  return set == nullptr ? is_python_space(character) : set->find(character) != set->npos;
}

Value strip(const Value& self, Arguments& given, const char* name, bool left, bool right) {
  const Parameters arguments(name, given, {"chars"}, 0, false);
  std::u32string letters;
  if (!arguments.none(0)) letters = to_characters(arguments.string(0));
  const std::u32string* set = arguments.none(0) ? nullptr : &letters;
  const string_view text = self.string();
  limits().copy(text.size());
  std::size_t begin = 0, end = text.size();
  while (left && begin < end) {
    std::size_t after = begin;
    if (!in_set(next_character(text, after), set)) break;
    limits().step(1 + letters.size() / 8);
    begin = after;
  }
  while (right && end > begin) {
    std::size_t before = end;
    if (!in_set(previous_character(text, before), set)) break;
    limits().step(1 + letters.size() / 8);
    end = before;
  }
  return text.substr(begin, end - begin);
}

Value split_at_spaces(string_view text, std::int64_t most, bool from_right) {
  std::vector<string_view> parts;
  for (;;) {
    text = stripped(text, !from_right, from_right);
    if (text.empty()) break;
    if (most >= 0 && static_cast<std::int64_t>(parts.size()) >= most) {
      parts.push_back(text);
      break;
    }
    std::size_t at = from_right ? text.size() : 0, next = at;
    while (from_right ? at > 0 : at < text.size()) {
      next = at;
      if (is_python_space(from_right ? previous_character(text, next) : next_character(text, next))) break;
      at = next;
    }
    parts.push_back(from_right ? text.substr(at) : text.substr(0, at));
    text = from_right ? text.substr(0, at) : text.substr(at);
  }
  if (from_right) std::reverse(parts.begin(), parts.end());
  return list_of_parts(parts);
}

Value split(const Value& self, Arguments& given, bool from_right) {
  const Parameters arguments(from_right ? "rsplit" : "split", given, {"sep", "maxsplit"}, 0);
  string_view text = self.string();
  limits().copy(text.size() * 2);
  std::int64_t most = arguments.integer(1, -1);
  if (arguments.none(0)) return split_at_spaces(text, most, from_right);
  const std::string& separator = arguments.string(0);
  if (separator.empty()) raise_error("ValueError", "empty separator");
  std::vector<string_view> parts;
  for (; most != 0; --most) {
    const std::size_t at = from_right ? text.rfind(separator) : text.find(separator);
    if (at == text.npos) break;
    const string_view before = text.substr(0, at), after = text.substr(at + separator.size());
    parts.push_back(from_right ? after : before);
    text = from_right ? before : after;
    limits().step();
  }
  parts.push_back(text);
  if (from_right) std::reverse(parts.begin(), parts.end());
  return list_of_parts(parts);
}

// The part of a string that the arguments start and end of a method choose, and where it begins (in bytes).
string_view part_of(const Value& self, const Parameters& arguments, std::size_t& begin, bool& valid) {
  const Text& text = *self.as<Text>();
  const auto length = static_cast<std::int64_t>(text.length());
  const auto bound = [&](std::size_t place, std::int64_t otherwise) {
    if (arguments.none(place)) return otherwise;
    std::int64_t value = integer_of(arguments[place],
                                    "slice indices must be integers or None or have an __index__ "
                                    "method");
    if (value < 0) value = std::max<std::int64_t>(value + length, 0);
    return value;
  };
  const std::int64_t start = bound(1, 0), stop = std::min(bound(2, length), length);
  valid = start <= stop;
  if (!valid) return {};
  begin = byte_of(text, static_cast<std::size_t>(start));
  return string_view(text.bytes).substr(begin, byte_of(text, static_cast<std::size_t>(stop)) - begin);
}

std::int64_t find(const Value& self, Arguments& given, const char* name, bool last) {
  const Parameters arguments(name, given, {"sub", "start", "end"}, 1, false);
  const std::string& sought = arguments.string(0);
  std::size_t begin = 0;
  bool valid = true;
  const string_view part = part_of(self, arguments, begin, valid);
  if (!valid) return -1;
  limits().copy(part.size());
  const std::size_t at = last ? part.rfind(sought) : part.find(sought);
  if (at == part.npos) return -1;
  return static_cast<std::int64_t>(count_characters(string_view(self.string()).substr(0, begin + at)));
}

Value index(const Value& self, Arguments& given, const char* name, bool last) {
  const std::int64_t place = find(self, given, name, last);
  if (place < 0) raise_error("ValueError", "substring not found");
  return place;
}

Value count(const Value& self, Arguments& given) {
  const Parameters arguments("count", given, {"sub", "start", "end"}, 1, false);
  const std::string& sought = arguments.string(0);
  std::size_t begin = 0;
  bool valid = true;
  const string_view part = part_of(self, arguments, begin, valid);
  if (!valid) return 0;
  limits().copy(part.size());
  if (sought.empty()) return static_cast<std::int64_t>(count_characters(part)) + 1;
  std::int64_t result = 0;
  for (std::size_t at = 0; (at = part.find(sought, at)) != part.npos; at += sought.size()) ++result;
  return result;
}

bool matches(string_view part, string_view affix, bool at_end) {
  if (affix.size() > part.size()) return false;
  return part.substr(at_end ? part.size() - affix.size() : 0, affix.size()) == affix;
}

Value affix(const Value& self, Arguments& given, bool at_end) {
  const Parameters arguments(at_end ? "endswith" : "startswith", given, {"prefix", "start", "end"}, 1, false);
  std::size_t begin = 0;
  bool valid = true;
  const string_view part = part_of(self, arguments, begin, valid);
  if (!arguments[0].is(Type::kTuple)) {
    if (!arguments[0].is_string()) {
      raise_error("TypeError", at_end ? "endswith" : "startswith", " first arg must be str or a tuple of str, not ",
                  type_name(arguments[0]));
    }
    return valid && matches(part, arguments[0].string(), at_end);
  }
  for (const Value& one : arguments[0].items()) {
    limits().step();
    if (!one.is_string()) {
      raise_error("TypeError", "tuple for ", at_end ? "endswith" : "startswith", " must only contain str, not ",
                  type_name(one));
    }
    if (valid && matches(part, one.string(), at_end)) return true;
  }
  return false;
}

Value replace(const Value& self, Arguments& given) {
  const Parameters arguments("replace", given, {"old", "new", "count"}, 2, false);
  const std::string &old = arguments.string(0), &by = arguments.string(1);
  std::int64_t most = arguments.integer(2, -1);
  const string_view text = self.string();
  limits().copy(text.size());
  Writer out;
  std::size_t at = 0;
  if (old.empty()) {
    for (; most != 0; --most) {
      out.add(by);
      if (at >= text.size()) break;
      const std::size_t from = at;
      next_character(text, at);
      out.add(text.substr(from, at - from));
    }
    out.add(text.substr(at));
    return std::move(out.text);
  }
  for (; most != 0; --most) {
    const std::size_t found = text.find(old, at);
    if (found == text.npos) break;
    out.add(text.substr(at, found - at)).add(by);
    at = found + old.size();
  }
  out.add(text.substr(at));
  return std::move(out.text);
}

Value join(const Value& self, Arguments& given) {
  const Parameters arguments("join", given, {"iterable"}, 1, false);
  if (!is_iterable(arguments[0])) raise_error("TypeError", "can only join an iterable");
  Cursor cursor(arguments[0]);
  Writer out;
  std::size_t place = 0;
  for (Value part; cursor.next(part); ++place) {
    if (!part.is_string()) {
      raise_error("TypeError", "sequence item ", place, ": expected str instance, ", type_name(part), " found");
    }
    if (place > 0) out.add(self.string());
    out.add(part.string());
  }
  return std::move(out.text);
}

// Text in a field of `width` characters.
Value justified(const Value& self, Arguments& given, const char* name, char align) {
  const Parameters arguments(name, given, {"width", "fillchar"}, 1, false);
  const std::int64_t width = arguments.integer(0, 0);
  const auto length = static_cast<std::int64_t>(self.as<Text>()->length());
  const std::string fill = arguments.has(1) ? arguments.string(1) : " ";
  if (count_characters(fill) != 1) {
    raise_error("TypeError", "The fill character must be exactly one character long");
  }
  const std::int64_t room = std::max<std::int64_t>(width - length, 0);
  // As CPython rounds.
  const std::int64_t left = align == '>' ? room : align == '<' ? 0 : room / 2 + (room & width & 1);
  Writer out;
  out.repeat(fill, static_cast<std::size_t>(left));
  out.add(self.string());
  out.repeat(fill, static_cast<std::size_t>(room - left));
  return std::move(out.text);
}

Value zfill(const Value& self, Arguments& given) {
  const Parameters arguments("zfill", given, {"width"}, 1, false);
  const std::string& text = self.string();
  const std::int64_t room = arguments.integer(0, 0) - static_cast<std::int64_t>(self.as<Text>()->length());
  const bool sign = !text.empty() && (text[0] == '-' || text[0] == '+');
  Writer out;
  if (room > 0) {
    out.add(text.substr(0, sign));
    out.repeat("0", static_cast<std::size_t>(room));
    out.add(string_view(text).substr(sign));
  } else {
    out.add(text);
  }
  return std::move(out.text);
}

Value partition(const Value& self, Arguments& given, bool last) {
  const Parameters arguments(last ? "rpartition" : "partition", given, {"sep"}, 1, false);
  const std::string& separator = arguments.string(0);
  if (separator.empty()) raise_error("ValueError", "empty separator");
  const std::string& text = self.string();
  const std::size_t at = last ? text.rfind(separator) : text.find(separator);
  limits().copy(text.size() * 2);
  if (at == std::string::npos) return last ? make_tuple({"", "", self}) : make_tuple({self, "", ""});
  return make_tuple({text.substr(0, at), separator, text.substr(at + separator.size())});
}

Value expandtabs(const Value& self, Arguments& given) {
  const Parameters arguments("expandtabs", given, {"tabsize"}, 0);
  const std::int64_t size = arguments.integer(0, 8);
  const string_view text = self.string();
  Writer out;
  std::int64_t column = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t from = at;
    const char32_t character = next_character(text, at);
    if (character == '\t') {
      const std::int64_t spaces = size > 0 ? size - column % size : 0;
      out.repeat(" ", static_cast<std::size_t>(spaces));
      column += spaces;
    } else {
      out.add(text.substr(from, at - from));
      column = character == '\n' || character == '\r' ? 0 : column + 1;
    }
  }
  return std::move(out.text);
}

Value without_affix(const Value& self, Arguments& given, bool at_end) {
  const Parameters arguments(at_end ? "removesuffix" : "removeprefix", given, {"affix"}, 1, false);
  const string_view text = self.string(), affix = arguments.string(0);
  if (!matches(text, affix, at_end)) return self;
  return at_end ? text.substr(0, text.size() - affix.size()) : text.substr(affix.size());
}

bool is_alphabetic_letter(char32_t character) { return is_letter(character); }
bool is_decimal(char32_t character) {
  return character < 0x80 ? character >= '0' && character <= '9' : category(character) == Category::kDecimalNumber;
}
bool is_digit(char32_t character) {
  if (character >= 0x80 && category(character) == Category::kOtherNumber)
    unsupported("isdigit with numbers such as superscripts");
  return is_decimal(character);
}

void no_arguments(const char* name, const Arguments& given) { Parameters(name, given, {}, 0); }

template <bool (*is)(char32_t)>
Value all_are(const Value& self, Arguments& given) {
  no_arguments("is...", given);
  return all_characters(self.string(), is);
}

template <std::string (*change)(string_view)>
Value changed(const Value& self, Arguments& given) {
  no_arguments("method", given);
  limits().copy(self.string().size() * 32);
  return change(self.string());
}

struct Entry {
  const char* name;
  Method method;
};

const Entry methods[] = {
    {"capitalize", changed<capitalized>},
    {"center", [](const Value& self, Arguments& given) { return justified(self, given, "center", '^'); }},
    {"count", count},
    {"endswith", [](const Value& self, Arguments& given) { return affix(self, given, true); }},
    {"expandtabs", expandtabs},
    {"find", [](const Value& self, Arguments& given) { return Value(find(self, given, "find", false)); }},
    {"format", [](const Value& self, Arguments& given) { return Value(braces_format(self.string(), given)); }},
    {"format_map",
     [](const Value& self, Arguments& given) {
       const Parameters arguments("format_map", given, {"mapping"}, 1, false);
       if (!arguments[0].is(Type::kDict)) unsupported("format_map with a ", type_name(arguments[0]));
       Arguments named;
       for (const auto& [key, value] : arguments[0].as<Dict>()->entries) {
         if (key.is_string()) named.named.emplace_back(key.string(), value);
       }
       return Value(braces_format(self.string(), named));
     }},
    {"index", [](const Value& self, Arguments& given) { return index(self, given, "index", false); }},
    {"isalnum", all_are<is_alphanumeric>},
    {"isalpha", all_are<is_alphabetic_letter>},
    {"isascii",
     [](const Value& self, Arguments& given) {
       no_arguments("isascii", given);
       return Value(self.as<Text>()->ascii());
     }},
    {"isdecimal", all_are<is_decimal>},
    {"isdigit", all_are<is_digit>},
    {"islower",
     [](const Value& self, Arguments& given) {
       no_arguments("islower", given);
       return Value(is_lower_text(self.string()));
     }},
    {"isprintable",
     [](const Value& self, Arguments& given) {
       no_arguments("isprintable", given);
       return Value(self.string().empty() || all_characters(self.string(), is_printable));
     }},
    {"isspace", all_are<is_python_space>},
    {"isupper",
     [](const Value& self, Arguments& given) {
       no_arguments("isupper", given);
       return Value(is_upper_text(self.string()));
     }},
    {"join", join},
    {"ljust", [](const Value& self, Arguments& given) { return justified(self, given, "ljust", '<'); }},
    {"lower", changed<to_lower>},
    {"lstrip", [](const Value& self, Arguments& given) { return strip(self, given, "lstrip", true, false); }},
    {"partition", [](const Value& self, Arguments& given) { return partition(self, given, false); }},
    {"removeprefix", [](const Value& self, Arguments& given) { return without_affix(self, given, false); }},
    {"removesuffix", [](const Value& self, Arguments& given) { return without_affix(self, given, true); }},
    {"replace", replace},
    {"rfind", [](const Value& self, Arguments& given) { return Value(find(self, given, "rfind", true)); }},
    {"rindex", [](const Value& self, Arguments& given) { return index(self, given, "rindex", true); }},
    {"rjust", [](const Value& self, Arguments& given) { return justified(self, given, "rjust", '>'); }},
    {"rpartition", [](const Value& self, Arguments& given) { return partition(self, given, true); }},
    {"rsplit", [](const Value& self, Arguments& given) { return split(self, given, true); }},
    {"rstrip", [](const Value& self, Arguments& given) { return strip(self, given, "rstrip", false, true); }},
    {"split", [](const Value& self, Arguments& given) { return split(self, given, false); }},
    {"splitlines",
     [](const Value& self, Arguments& given) {
       const Parameters arguments("splitlines", given, {"keepends"}, 0);
       return make_list(split_lines(self.string(), arguments.truth(0, false)));
     }},
    {"startswith", [](const Value& self, Arguments& given) { return affix(self, given, false); }},
    {"strip", [](const Value& self, Arguments& given) { return strip(self, given, "strip", true, true); }},
    {"title", changed<to_title>},
    {"upper", changed<to_upper>},
    {"zfill", zfill},
};

}  // namespace

bool all_characters(const std::string& text, bool (*is)(char32_t)) {
  limits().copy(text.size() * 8);
  for (std::size_t at = 0; at < text.size();) {
    if (!is(next_character(text, at))) return false;
  }
  return !text.empty();
}

bool is_alphanumeric(char32_t character) { return is_letter(character) || is_number(character); }

namespace {

// Whether there are letters with case, and all of them have this one.
bool has_case(const std::string& text, bool (*wanted)(char32_t), bool (*other)(char32_t)) {
  limits().copy(text.size() * 8);
  bool found = false;
  for (std::size_t at = 0; at < text.size();) {
    const char32_t character = next_character(text, at);
    if (other(character) || (character >= 0x80 && category(character) == Category::kTitleLetter)) return false;
    found = found || wanted(character);
  }
  return found;
}

}  // namespace

bool is_lower_text(const std::string& text) { return has_case(text, is_lower, is_upper); }
bool is_upper_text(const std::string& text) { return has_case(text, is_upper, is_lower); }

std::vector<Value> split_lines(const std::string& text, bool keep_ends) {
  Collector lines;
  limits().copy(text.size() * 2);
  std::size_t begin = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = at;
    const char32_t character = next_character(text, at);
    const bool is_end = (character >= 0x0A && character <= 0x0D) || (character >= 0x1C && character <= 0x1E) ||
                        character == 0x85 || character == 0x2028 || character == 0x2029;
    if (!is_end) continue;
    if (character == '\r' && at < text.size() && text[at] == '\n') ++at;
    lines.add(Value(text.substr(begin, (keep_ends ? at : end) - begin)));
    begin = at;
  }
  if (begin < text.size()) lines.add(Value(text.substr(begin)));
  return std::move(lines.values);
}

Method string_method(const std::string& name) {
  for (const Entry& entry : methods) {
    if (name == entry.name) return entry.method;
  }
  return nullptr;
}

}  // namespace edgelm::capi::chat
