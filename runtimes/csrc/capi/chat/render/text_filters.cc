// Filters of texts and numbers.
#include <algorithm>
#include <cmath>

#include "capi/chat/render/filters.h"
#include "capi/chat/values/text.h"
#include "capi/common/unicode.h"

namespace edgelm::capi::chat {

namespace {

// soft_str(value): a string as it is.
std::string soft_text(const Value& value) {
  if (value.is_string() && value.as<Text>()->markup)
    unsupported("a filter of a text that the filters escape or safe made");
  return text_of_value(value);
}

// A filter that is a method of strings.
Value as_method(const char* name, Arguments& given) {
  const Value text(soft_text(given.positional[0]));
  Arguments rest{{given.positional.begin() + 1, given.positional.end()}, given.named};
  return string_method(name)(text, rest);
}

Value absolute(Arguments& given) {
  const Parameters arguments("abs", given, {"value"}, 1, false);
  const Value& value = arguments[0];
  if (value.is_undefined()) value.as<Undefined>()->fail();
  if (!value.is_number()) raise_error("TypeError", "bad operand type for abs(): '", type_name(value), "'");
  if (value.is(Type::kFloat)) return std::fabs(value.real());
  return value.integer() < 0 ? negative(value) : Value(value.integer());
}

Value capitalize(Arguments& given) {
  Parameters("capitalize", given, {"s"}, 1);
  return as_method("capitalize", given);
}

Value center(Arguments& given) {
  const Parameters arguments("center", given, {"value", "width"}, 1);
  const Value text(soft_text(arguments[0]));
  Arguments rest{{arguments.value(1, Value(80))}, {}};
  return string_method("center")(text, rest);
}

Value defaulted(Arguments& given) {
  const Parameters arguments("default", given, {"value", "default_value", "boolean"}, 1);
  const bool missing = arguments[0].is_undefined() || (arguments.truth(2, false) && !truth(arguments[0]));
  return missing ? arguments.value(1, Value("")) : arguments[0];
}

Value escape(Arguments& given) {
  const Parameters arguments("escape", given, {"s"}, 1, false);
  const Value& value = arguments[0];
  if (value.is_string() && value.as<Text>()->markup) return value;
  return make_string(escaped(text_of_value(value)), true);
}

Value safe(Arguments& given) {
  const Parameters arguments("safe", given, {"value"}, 1);
  return make_string(text_of_value(arguments[0]), true);
}

Value to_float(Arguments& given) {
  const Parameters arguments("float", given, {"value", "default"}, 1);
  const Value& value = arguments[0];
  if (value.is_undefined()) value.as<Undefined>()->fail();
  if (value.is_number()) return value.real();
  double real = 0;
  if (value.is_string() && read_float(value.string(), real)) return real;
  return arguments.value(1, Value(0.0));
}

Value whole(double real, const Value& otherwise, bool first) {
  if (std::isnan(real)) return otherwise;
  if (std::isinf(real)) {
    if (first) raise_error("OverflowError", "cannot convert float infinity to integer");
    return otherwise;
  }
  if (std::fabs(real) >= 9.2e18) unsupported("integers beyond 64 bits");
  return static_cast<std::int64_t>(real);
}

Value to_int(Arguments& given) {
  const Parameters arguments("int", given, {"value", "default", "base"}, 1);
  const Value& value = arguments[0];
  const Value otherwise = arguments.value(1, Value(0));
  if (value.is_undefined()) value.as<Undefined>()->fail();
  if (value.is_integral()) return value.integer();
  if (value.is(Type::kFloat)) return whole(value.real(), otherwise, true);
  if (!value.is_string()) return otherwise;
  Value result;
  double real = 0;
  const std::int64_t base = arguments.has(2) ? integer_of(arguments[2]) : 10;
  const bool valid = base == 0 || (base >= 2 && base <= 36);
  limits().copy(value.string().size() * 8);
  if (valid && value.string().size() > 4300) raise_error("ValueError", "Exceeds the limit of digits of an integer");
  if (valid && read_integer(value.string(), static_cast<int>(base), result)) return result;
  return read_float(value.string(), real) ? whole(real, otherwise, false) : otherwise;
}

Value format(Arguments& given) {
  const Value& value = given.positional[0];
  if (given.positional.size() > 1 && !given.named.empty()) {
    throw Failure(Failure::kFailed, "can't handle positional and keyword arguments at the same time");
  }
  const Value right = given.named.empty() ? make_tuple({given.positional.begin() + 1, given.positional.end()})
                                          : dict_of({{}, given.named}, "format");
  return percent_format(soft_text(value), right);
}

Value indent(Arguments& given) {
  const Parameters arguments("indent", given, {"s", "width", "first", "blank"}, 1);
  if (arguments[0].is_undefined()) arguments[0].as<Undefined>()->fail();
  if (!arguments[0].is_string()) {
    raise_error("TypeError", "can only concatenate str (not \"", type_name(arguments[0]), "\") to str");
  }
  Writer indentation;
  if (arguments.has(1) && arguments[1].is_string()) {
    indentation.add(arguments[1].string());
  } else {
    indentation.repeat(" ", static_cast<std::size_t>(std::max<std::int64_t>(arguments.integer(1, 4), 0)));
  }
  const bool blank = arguments.truth(3, false);
  const std::vector<Value> lines = split_lines(soft_text(arguments[0]) + "\n", false);
  Writer out;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    const std::string& line = lines[i].string();
    if (i > 0) out.add("\n");
    if (i == 0 ? arguments.truth(2, false) : blank || !line.empty()) out.add(indentation.text);
    out.add(line);
  }
  return std::move(out.text);
}

Value lower(Arguments& given) {
  Parameters("lower", given, {"s"}, 1);
  return as_method("lower", given);
}

Value upper(Arguments& given) {
  Parameters("upper", given, {"s"}, 1);
  return as_method("upper", given);
}

Value replace(Arguments& given) {
  const Parameters arguments("replace", given, {"s", "old", "new", "count"}, 3);
  const Value text(soft_text(arguments[0]));
  const std::int64_t most = arguments.none(3) ? -1 : integer_of(arguments[3]);
  Arguments rest{{Value(text_of_value(arguments[1])), Value(text_of_value(arguments[2])), Value(most)}, {}};
  return string_method("replace")(text, rest);
}

Value round(Arguments& given) {
  const Parameters arguments("round", given, {"value", "precision", "method"}, 1);
  const std::string method = arguments.has(2) && arguments[2].is_string() ? arguments[2].string() : "common";
  const Value& value = arguments[0];
  if ((arguments.has(2) && !arguments[2].is_string()) ||
      (method != "common" && method != "ceil" && method != "floor")) {
    throw Failure(Failure::kFailed, "method must be common, ceil or floor");
  }
  const Value digits = arguments.value(1, Value(0));
  if (method == "common") {
    if (digits.is(Type::kNone)) unsupported("the filter round with the precision none");
    return rounded(value, digits);
  }
  if (value.is_undefined()) value.as<Undefined>()->fail();
  if (!value.is_number()) raise_error("TypeError", "must be real number, not ", type_name(value));
  const Value unit = calculate(Operator::kPower, Value(10), digits);
  const Value large = calculate(Operator::kMultiply, value, unit);
  const double real = large.real();
  if (!std::isfinite(real)) raise_error("OverflowError", "cannot convert float infinity or NaN to integer");
  if (large.is(Type::kFloat) && std::fabs(real) >= 9.2e18) unsupported("integers beyond 64 bits");
  const Value cut = large.is_integral()
                        ? Value(large.integer())
                        : Value(static_cast<std::int64_t>(method == "ceil" ? std::ceil(real) : std::floor(real)));
  return calculate(Operator::kDivide, cut, unit);
}

Value string(Arguments& given) {
  const Parameters arguments("string", given, {"object"}, 1, false);
  return arguments[0].is_string() ? arguments[0] : Value(text_of_value(arguments[0]));
}

Value title(Arguments& given) {
  const Parameters arguments("title", given, {"s"}, 1);
  const std::string text = soft_text(arguments[0]);
  limits().copy(text.size() * 32);
  Writer out;
  const auto separates = [](char32_t character) {
    return character == '-' || character == '(' || character == '{' || character == '[' || character == '<' ||
           is_python_space(character);
  };
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t begin = at;
    std::size_t second = begin, end = begin;
    const bool separator = separates(next_character(text, second));
    for (at = second, end = second; at < text.size() && separates(next_character(text, at)) == separator;) end = at;
    const std::string_view word = std::string_view(text).substr(begin, end - begin);
    // Separators have no case.
    out.add(to_upper(word.substr(0, second - begin))).add(to_lower(word.substr(second - begin)));
    at = end;
  }
  return std::move(out.text);
}

Value tojson(Arguments& given) {
  const Parameters arguments("tojson", given, {"x", "ensure_ascii", "indent", "separators", "sort_keys"}, 1);
  Writer indentation;
  const bool several = !arguments.none(2);
  if (several && arguments[2].is_string()) {
    indentation.add(arguments[2].string());
  } else if (several) {
    if (!arguments[2].is_integral()) {
      raise_error("TypeError", "can't multiply sequence by non-int of type '", type_name(arguments[2]), "'");
    }
    indentation.repeat(" ", static_cast<std::size_t>(std::max<std::int64_t>(arguments[2].integer(), 0)));
  }
  std::string items = several ? "," : ", ", keys = ": ";
  if (!arguments.none(3)) {
    const std::vector<Value> parts = list_of(arguments[3]);
    if (parts.size() != 2) {
      raise_error("ValueError", parts.size() > 2 ? "too many values to unpack (expected 2)"
                                                 : "not enough values to unpack (expected 2)");
    }
    for (const Value& part : parts) {
      if (!part.is_string()) raise_error("TypeError", "separators must be str, not ", type_name(part));
    }
    items = parts[0].string();
    keys = parts[1].string();
  }
  return json_text(arguments[0], arguments.truth(1, false), several ? &indentation.text : nullptr, items, keys,
                   arguments.truth(4, false));
}

Value trim(Arguments& given) {
  const Parameters arguments("trim", given, {"value", "chars"}, 1);
  const Value text(soft_text(arguments[0]));
  Arguments rest{{arguments.value(1, Value())}, {}};
  return string_method("strip")(text, rest);
}

Value truncate(Arguments& given) {
  const Parameters arguments("truncate", given, {"s", "length", "killwords", "end", "leeway"}, 1);
  const std::int64_t length = arguments.integer(1, 255), leeway = arguments.none(4) ? 5 : arguments.integer(4, 5);
  const Value end = arguments.value(3, Value("..."));
  const std::int64_t end_length = length_of(end);
  if (length < end_length) {
    raise_error("AssertionError", "expected length >= ", end_length, ", got ", length);
  }
  if (leeway < 0) raise_error("AssertionError", "expected leeway >= 0, got ", leeway);
  if (length_of(arguments[0]) <= length + leeway) return arguments[0];
  Value result = slice(arguments[0], Value(), Value(length - end_length), Value());
  if (!result.is_string()) {
    if (!arguments.truth(2, false)) raise_error("AttributeError", "object has no attribute 'rsplit'");
    return calculate(Operator::kAdd, result, end);
  }
  std::string text = soft_text(result);
  if (!arguments.truth(2, false)) text = text.substr(0, std::min(text.rfind(' '), text.size()));
  return calculate(Operator::kAdd, Value(text), end);
}

Value wordcount(Arguments& given) {
  const Parameters arguments("wordcount", given, {"s"}, 1);
  const std::string text = soft_text(arguments[0]);
  limits().copy(text.size() * 8);
  std::int64_t count = 0;
  bool inside = false;
  for (std::size_t at = 0; at < text.size();) {
    const char32_t character = next_character(text, at);
    const bool word = character == '_' || is_alphanumeric(character);
    count += word && !inside;
    inside = word;
  }
  return count;
}

}  // namespace

Value without_case(const Value& value) {
  if (!value.is_string()) return value;
  limits().copy(value.string().size() * 32);
  return to_lower(value.string());
}

Filter text_filter(const std::string& name) {
  static const std::pair<const char*, Filter> filters[] = {
      {"abs", absolute},  {"capitalize", capitalize}, {"center", center},   {"d", defaulted},   {"default", defaulted},
      {"e", escape},      {"escape", escape},         {"float", to_float},  {"format", format}, {"indent", indent},
      {"int", to_int},    {"lower", lower},           {"replace", replace}, {"round", round},   {"safe", safe},
      {"string", string}, {"title", title},           {"tojson", tojson},   {"trim", trim},     {"truncate", truncate},
      {"upper", upper},   {"wordcount", wordcount}};
  for (const auto& [known, filter] : filters) {
    if (name == known) return filter;
  }
  return nullptr;
}

}  // namespace edgelm::capi::chat
