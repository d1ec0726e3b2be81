// Arithmetic, and numbers as text.
#include <charconv>
#include <cmath>
#include <limits>

#include "capi/chat/values/operations.h"
#include "capi/chat/values/text.h"
#include "capi/common/json_parser.h"

namespace edgelm::capi::chat {

namespace {

[[noreturn]] void beyond() { unsupported("integers beyond 64 bits"); }

Value divided(std::int64_t left, std::int64_t right) {
  if (right == 0) raise_error("ZeroDivisionError", "division by zero");
  return static_cast<double>(static_cast<long double>(left) / static_cast<long double>(right));
}

std::int64_t floor_divided(std::int64_t left, std::int64_t right) {
  if (right == 0) raise_error("ZeroDivisionError", "integer division or modulo by zero");
  if (left == INT64_MIN && right == -1) beyond();
  const std::int64_t quotient = left / right;
  return quotient - (left % right != 0 && (left < 0) != (right < 0));
}

std::int64_t modulo(std::int64_t left, std::int64_t right) {
  if (right == 0) raise_error("ZeroDivisionError", "integer modulo by zero");
  if (right == -1) return 0;
  const std::int64_t rest = left % right;
  return rest != 0 && (rest < 0) != (right < 0) ? rest + right : rest;
}

Value power(std::int64_t base, std::int64_t exponent) {
  if (exponent < 0) {
    if (base == 0) raise_error("ZeroDivisionError", "0.0 cannot be raised to a negative power");
    return std::pow(static_cast<double>(base), static_cast<double>(exponent));
  }
  std::int64_t result = 1;
  if (base == 0 || base == 1) return exponent == 0 ? std::int64_t(1) : base;
  if (base == -1) return std::int64_t(exponent % 2 == 0 ? 1 : -1);
  if (exponent > 64) beyond();
  for (; exponent > 0; --exponent) {
    if (__builtin_mul_overflow(result, base, &result)) beyond();
  }
  return result;
}

Value calculate_integers(Operator sign, std::int64_t left, std::int64_t right) {
  std::int64_t result = 0;
  switch (sign) {
    case Operator::kAdd:
      if (__builtin_add_overflow(left, right, &result)) beyond();
      return result;
    case Operator::kSubtract:
      if (__builtin_sub_overflow(left, right, &result)) beyond();
      return result;
    case Operator::kMultiply:
      if (__builtin_mul_overflow(left, right, &result)) beyond();
      return result;
    case Operator::kDivide: return divided(left, right);
    case Operator::kFloorDivide: return floor_divided(left, right);
    case Operator::kModulo: return modulo(left, right);
    default: return power(left, right);
  }
}

double float_modulo(double left, double right) {
  const double rest = std::fmod(left, right);
  if (rest == 0) return std::copysign(0.0, right);
  return (right < 0) != (rest < 0) ? rest + right : rest;
}

double float_floor_divided(double left, double right) {
  double rest = std::fmod(left, right);
  double quotient = (left - rest) / right;
  if (rest != 0 && (right < 0) != (rest < 0)) quotient -= 1;
  if (quotient == 0) return std::copysign(0.0, left / right);
  const double whole = std::floor(quotient);
  return quotient - whole > 0.5 ? whole + 1 : whole;
}

double float_power(double base, double exponent) {
  if (base == 0 && exponent < 0) raise_error("ZeroDivisionError", "0.0 cannot be raised to a negative power");
  if (base < 0 && std::isfinite(base) && std::isfinite(exponent) && exponent != std::floor(exponent)) {
    unsupported("complex numbers");
  }
  const double result = std::pow(base, exponent);
  if (std::isinf(result) && std::isfinite(base) && std::isfinite(exponent)) {
    raise_error("OverflowError", "(34, 'Numerical result out of range')");
  }
  return result;
}

Value calculate_floats(Operator sign, double left, double right) {
  switch (sign) {
    case Operator::kAdd: return left + right;
    case Operator::kSubtract: return left - right;
    case Operator::kMultiply: return left * right;
    case Operator::kDivide:
      if (right == 0) raise_error("ZeroDivisionError", "float division by zero");
      return left / right;
    case Operator::kFloorDivide:
      if (right == 0) raise_error("ZeroDivisionError", "float floor division by zero");
      return float_floor_divided(left, right);
    case Operator::kModulo:
      if (right == 0) raise_error("ZeroDivisionError", "float modulo");
      return float_modulo(left, right);
    default: return float_power(left, right);
  }
}

// A string or a sequence `count` times.
Value repeated(const Value& value, std::int64_t count) {
  const std::size_t times = count > 0 ? static_cast<std::size_t>(count) : 0;
  if (value.is_string()) {
    Writer out;
    out.repeat(value.string(), times);
    return make_string(std::move(out.text), value.as<Text>()->markup);
  }
  const std::vector<Value>& items = value.items();
  if (!items.empty() && times > Limits::kMemory / sizeof(Value) / items.size()) limits().check(SIZE_MAX);
  limits().check(items.size() * times * sizeof(Value));
  limits().step(items.size() * times);
  std::vector<Value> all;
  all.reserve(items.size() * times);
  for (std::size_t i = 0; i < times && !items.empty(); ++i) all.insert(all.end(), items.begin(), items.end());
  return value.is(Type::kList) ? make_list(std::move(all)) : make_tuple(std::move(all));
}

Value joined(const Value& left, const Value& right) {
  if (left.is_string()) {
    const Text &a = *left.as<Text>(), &b = *right.as<Text>();
    const bool markup = a.markup || b.markup;
    Writer out;
    out.add(markup && !a.markup ? escaped(a.bytes) : a.bytes);
    out.add(markup && !b.markup ? escaped(b.bytes) : b.bytes);
    return make_string(std::move(out.text), markup);
  }
  limits().check((left.items().size() + right.items().size()) * sizeof(Value));
  limits().step(left.items().size() + right.items().size());
  std::vector<Value> all = left.items();
  all.insert(all.end(), right.items().begin(), right.items().end());
  return left.is(Type::kList) ? make_list(std::move(all)) : make_tuple(std::move(all));
}

}  // namespace

Value calculate(Operator sign, const Value& left, const Value& right) {
  if (left.is_integral() && right.is_integral()) return calculate_integers(sign, left.integer(), right.integer());
  if (left.is_number() && right.is_number()) return calculate_floats(sign, left.real(), right.real());
  if (left.is_undefined()) left.as<Undefined>()->fail();
  if (left.is_string() && sign == Operator::kModulo) {
    if (left.as<Text>()->markup) unsupported("% with a text that the filters escape or safe made");
    return percent_format(left.string(), right);
  }
  if (right.is_undefined()) right.as<Undefined>()->fail();
  if (left.is(Type::kView) || right.is(Type::kView)) {
    unsupported("operators with what keys(), values() or items() returned");
  }
  if (left.is(Type::kDict) && right.is(Type::kDict)) {
    raise_error("TypeError", "unsupported operand type(s): 'dict' and 'dict'");
  }
  const auto listed = [](const Value& value) { return value.is_sequence() || value.is_string(); };
  if (sign == Operator::kAdd && listed(left)) {
    if (left.type() == right.type()) return joined(left, right);
    raise_error("TypeError", "can only concatenate ", type_name(left), " (not \"", type_name(right), "\") to ",
                type_name(left));
  }
  if (sign == Operator::kMultiply && listed(left) && right.is_integral()) return repeated(left, right.integer());
  if (sign == Operator::kMultiply && left.is_integral() && listed(right)) return repeated(right, left.integer());
  static const char* const names[] = {"+", "-", "*", "/", "//", "%", "** or pow()"};
  raise_error("TypeError", "unsupported operand type(s) for ", names[static_cast<int>(sign)], ": '", type_name(left),
              "' and '", type_name(right), "'");
}

Value negative(const Value& value) {
  if (value.is_undefined()) value.as<Undefined>()->fail();
  if (value.is(Type::kFloat)) return -value.real();
  if (!value.is_integral()) raise_error("TypeError", "bad operand type for unary -: '", type_name(value), "'");
  if (value.integer() == INT64_MIN) beyond();
  return -value.integer();
}

Value positive(const Value& value) {
  if (value.is_undefined()) value.as<Undefined>()->fail();
  if (value.is(Type::kFloat)) return value;
  if (!value.is_integral()) raise_error("TypeError", "bad operand type for unary +: '", type_name(value), "'");
  return value.integer();
}

namespace {

// The digits of a number without underlines, which may stand between digits. False where one stands elsewhere.
bool without_underlines(std::string_view text, std::string& digits) {
  const auto alphanumeric = [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
  };
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '_') {
      digits += text[i];
    } else if (i == 0 || i + 1 == text.size() || !alphanumeric(text[i - 1]) || !alphanumeric(text[i + 1])) {
      return false;
    }
  }
  return true;
}

}  // namespace

bool read_integer(std::string_view text, int base, Value& value) {
  text = stripped(text);
  const bool minus = !text.empty() && text[0] == '-';
  if (!text.empty() && (text[0] == '-' || text[0] == '+')) text.remove_prefix(1);
  const auto prefix = [&](char letter, int of) {
    if (text.size() < 2 || text[0] != '0' || (text[1] | 0x20) != letter || (base != of && base != 0)) return false;
    base = of;
    text.remove_prefix(2);
    if (!text.empty() && text[0] == '_') text.remove_prefix(1);
    return true;
  };
  if (!prefix('x', 16) && !prefix('o', 8) && !prefix('b', 2) && base == 0) {
    if (text.size() > 1 && text[0] == '0' && text.find_first_not_of("0_") != text.npos) return false;
    base = 10;
  }
  std::string digits;
  if (text.empty() || !without_underlines(text, digits)) return false;
  std::int64_t result = 0;
  if (minus) digits.insert(0, 1, '-');
  const char* end = digits.data() + digits.size();
  const auto [read, error] = std::from_chars(digits.data(), end, result, base);
  if (error == std::errc::result_out_of_range && read == end) beyond();
  if (error != std::errc() || read != end || (minus && digits.size() > 1 && digits[1] == '-')) return false;
  value = Value(result);
  return true;
}

bool read_float(std::string_view text, double& value) {
  text = stripped(text);
  std::string digits;
  if (text.size() > 4096 || !without_underlines(text, digits) || digits.empty()) return false;
  std::string_view rest = digits;
  const bool minus = rest[0] == '-';
  if (rest[0] == '-' || rest[0] == '+') rest.remove_prefix(1);
  std::string word;
  for (const char letter : rest) word += static_cast<char>(letter | 0x20);
  if (word == "inf" || word == "infinity" || word == "nan") {
    value = word == "nan" ? std::nan("") : std::numeric_limits<double>::infinity();
    if (minus) value = -value;
    return true;
  }
  // Digits, a point, digits, an exponent: all else is no number for Python.
  std::size_t at = 0, count = 0;
  const auto skip = [&] {
    const std::size_t from = at;
    while (at < rest.size() && rest[at] >= '0' && rest[at] <= '9') ++at;
    return at - from;
  };
  count = skip();
  if (at < rest.size() && rest[at] == '.') {
    ++at;
    count += skip();
  }
  if (count == 0) return false;
  if (at < rest.size() && (rest[at] | 0x20) == 'e') {
    ++at;
    if (at < rest.size() && (rest[at] == '-' || rest[at] == '+')) ++at;
    if (skip() == 0) return false;
  }
  if (at != rest.size()) return false;
  value = read_double(std::string(rest));
  if (minus) value = -value;
  return true;
}

Value rounded(const Value& value, const Value& digits) {
  if (value.is_undefined()) value.as<Undefined>()->fail();
  const std::int64_t places = integer_of(digits);
  if (value.is_integral()) {
    if (places >= 0) return value.integer();
    if (places < -18) return std::int64_t(0);
    std::int64_t unit = 1;
    for (std::int64_t i = 0; i > places; --i) unit *= 10;
    const std::int64_t floor = floor_divided(value.integer(), unit), rest = value.integer() - floor * unit;
    const bool up = rest * 2 > unit || (rest * 2 == unit && floor % 2 != 0);
    std::int64_t result = 0;
    if (__builtin_mul_overflow(floor + up, unit, &result)) beyond();
    return result;
  }
  if (!value.is(Type::kFloat)) raise_error("TypeError", "type ", type_name(value), " doesn't define __round__ method");
  const double real = value.real();
  if (!std::isfinite(real) || places > 323) return real;
  if (places < -308) return std::copysign(0.0, real);
  if (places >= 0) return read_double(printed(real, 'f', static_cast<int>(places)));
  // Half-way cases are decided by all digits of the double.
  const double unit = std::pow(10.0, static_cast<double>(-places));
  const double low = std::floor(real / unit) * unit, rest = real - low;
  const bool up = rest * 2 > unit || (rest * 2 == unit && std::fmod(low / unit, 2) != 0);
  const double result = up ? low + unit : low;
  if (!std::isfinite(result)) raise_error("OverflowError", "rounded value too large to represent");
  return std::copysign(result, real);
}

}  // namespace edgelm::capi::chat
