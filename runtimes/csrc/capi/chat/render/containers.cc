// The methods of dicts, lists, tuples and ranges, and str.format.
#include <algorithm>

#include "capi/chat/render/call.h"
#include "capi/chat/values/text.h"

namespace edgelm::capi::chat {

namespace {

Value get(const Value& self, Arguments& given) {
  const Parameters arguments("get", given, {"key", "default"}, 1, false);
  const Value* found = self.as<Dict>()->find(arguments[0]);
  return found != nullptr ? *found : arguments.value(1, Value());
}

template <View::Kind kind>
Value view(const Value& self, Arguments& given) {
  Parameters("keys, values and items", given, {}, 0);
  return Value(Type::kView, new View(kind, self));
}

Value copy(const Value& self, Arguments& given) {
  Parameters("copy", given, {}, 0);
  return self;  // values never change
}

Value count(const Value& self, Arguments& given) {
  const Parameters arguments("count", given, {"value"}, 1, false);
  std::int64_t result = 0;
  Cursor cursor(self);
  for (Value item; cursor.next(item);) result += equal(item, arguments[0]);
  return result;
}

Value index(const Value& self, Arguments& given) {
  const bool range = self.is(Type::kRange);
  const Parameters arguments("index", given, {"value", "start", "stop"}, 1, false);
  const std::int64_t length = length_of(self);
  const auto bound = [&](std::size_t place, std::int64_t otherwise) {
    const std::int64_t value = arguments.integer(place, otherwise);
    return value < 0 ? std::max<std::int64_t>(value + length, 0) : value;
  };
  if (range && (arguments.has(1) || arguments.has(2))) raise_error("TypeError", "range.index() takes one argument");
  const std::int64_t start = bound(1, 0), stop = std::min(bound(2, length), length);
  for (std::int64_t i = start; i < stop; ++i) {
    if (equal(range ? self.as<Range>()->at(i) : self.items()[static_cast<std::size_t>(i)], arguments[0])) return i;
  }
  raise_error("ValueError", shown(arguments[0]), " is not in ", type_name(self));
}

// str.format: fields in braces.
class Braces {
 public:
  explicit Braces(const Arguments& arguments) : arguments_(arguments) {}

  void write(Writer& out, std::string_view text, int depth) {
    if (depth > 2) raise_error("ValueError", "Max string recursion exceeded");
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t end = std::min(text.find_first_of("{}", at), text.size());
      out.add(text.substr(at, end - at));
      if (end == text.size()) return;
      if (end + 1 < text.size() && text[end + 1] == text[end]) {
        out.add(text.substr(end, 1));
        at = end + 2;
      } else if (text[end] == '}') {
        raise_error("ValueError", "Single '}' encountered in format string");
      } else {
        at = field(out, text, end + 1, depth);
      }
    }
  }

 private:
  // Write the field after a brace; returns where it ends.
  std::size_t field(Writer& out, std::string_view text, std::size_t begin, int depth) {
    std::size_t end = begin;
    for (int open = 1;; ++end) {
      if (end >= text.size()) {
        raise_error("ValueError", begin >= text.size() ? "Single '{' encountered in format string"
                                                       : "expected '}' before end of string");
      }
      open += text[end] == '{' ? 1 : text[end] == '}' ? -1 : 0;
      if (open == 0) break;
    }
    const std::string_view inside = text.substr(begin, end - begin);
    std::size_t name_end = 0;
    for (bool bracket = false; name_end < inside.size(); ++name_end) {
      const char letter = inside[name_end];
      bracket = letter == '[' || (bracket && letter != ']');
      if (letter == '{') raise_error("ValueError", "unexpected '{' in field name");
      if (!bracket && (letter == ':' || letter == '!')) break;
    }
    Value value = named(inside.substr(0, name_end));
    std::string_view rest = inside.substr(name_end);
    if (!rest.empty() && rest[0] == '!') {
      if (rest.size() < 2) raise_error("ValueError", "end of string while looking for conversion specifier");
      if (rest.size() > 2 && rest[2] != ':') raise_error("ValueError", "expected ':' after conversion specifier");
      if (rest[1] == 'a') unsupported("the conversion !a");
      if (rest[1] != 's' && rest[1] != 'r') {
        raise_error("ValueError", "Unknown conversion specifier ", std::string(rest.substr(1, 1)));
      }
      value = Value(rest[1] == 's' ? text_of_value(value) : repr_of(value));
      rest.remove_prefix(2);
    }
    Writer spec;
    if (!rest.empty()) write(spec, rest.substr(1), depth + 1);
    out.add(format_value(value, spec.text));
    return end + 1;
  }

  Value named(std::string_view name) {
    std::size_t end = std::min(name.find_first_of(".["), name.size());
    Value value = first(std::string(name.substr(0, end)));
    while (end < name.size()) {
      const bool item = name[end] == '[';
      std::size_t next = item ? name.find(']', end) : std::min(name.find_first_of(".[", end + 1), name.size());
      if (next == name.npos) raise_error("ValueError", "Missing ']' in format string");
      const std::string part(name.substr(end + 1, next - end - 1));
      if (part.empty()) raise_error("ValueError", "Empty attribute in format string");
      Value number;
      const bool digits = part.find_first_not_of("0123456789") == part.npos && read_integer(part, 10, number);
      value = item ? item_of(value, digits ? number : Value(part)) : attribute_of(value, part);
      end = next + item;
      if (item && end < name.size() && name[end] != '.' && name[end] != '[') {
        raise_error("ValueError", "Only '.' or '[' may follow ']' in format field specifier");
      }
    }
    return value;
  }

  Value first(const std::string& name) {
    Value number;
    const bool digits = !name.empty() && name.find_first_not_of("0123456789") == name.npos;
    if (name.empty() || digits) {
      if (digits) read_integer(name, 10, number);
      const int mode = digits ? 2 : 1;
      if (mode_ != 0 && mode_ != mode) {
        raise_error("ValueError", mode == 2
                                      ? "cannot switch from manual field specification to automatic field numbering"
                                      : "cannot switch from manual field specification to automatic field "
                                        "numbering");
      }
      mode_ = mode;
      const std::size_t place = digits ? static_cast<std::size_t>(number.integer()) : next_++;
      if (place >= arguments_.positional.size()) {
        raise_error("IndexError", "Replacement index ", place, " out of range for positional args tuple");
      }
      return arguments_.positional[place];
    }
    for (const auto& [key, value] : arguments_.named) {
      if (key == name) return value;
    }
    raise_error("KeyError", repr_of_text(name));
  }

  const Arguments& arguments_;
  std::size_t next_ = 0;
  int mode_ = 0;
};

struct Entry {
  const char* name;
  Method method;
};

Method among(const Entry* begin, const Entry* end, const std::string& name) {
  for (; begin != end; ++begin) {
    if (name == begin->name) return begin->method;
  }
  return nullptr;
}

}  // namespace

std::string braces_format(const std::string& format, const Arguments& arguments) {
  Writer out;
  Braces(arguments).write(out, format, 0);
  return std::move(out.text);
}

Method container_method(Type type, const std::string& name) {
  static const Entry dicts[] = {{"copy", copy},
                                {"get", get},
                                {"items", view<View::kItems>},
                                {"keys", view<View::kKeys>},
                                {"values", view<View::kValues>}};
  static const Entry others[] = {{"count", count}, {"index", index}, {"copy", copy}};
  if (type == Type::kDict) return among(std::begin(dicts), std::end(dicts), name);
  if (type == Type::kList) return among(std::begin(others), std::end(others), name);
  if (type == Type::kTuple || type == Type::kRange) return among(std::begin(others), std::end(others) - 1, name);
  return nullptr;
}

}  // namespace edgelm::capi::chat
