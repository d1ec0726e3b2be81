// The operator % of strings, and format().
#include <charconv>
#include <cmath>
#include <locale>
#include <sstream>

#include "capi/chat/values/operations.h"
#include "capi/chat/values/text.h"
#include "capi/common/json.h"
#include "capi/common/unicode.h"

namespace edgelm::capi::chat {

std::string printed(double value, char kind, int precision, bool alternate) {
  if (alternate) unsupported("'#' in the format of a float");
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  limits().check(static_cast<std::size_t>(precision) + 400);
  limits().copy(static_cast<std::size_t>(precision));
#if defined(__cpp_lib_to_chars) && __cpp_lib_to_chars >= 201611L
  const std::chars_format format = kind == 'f'   ? std::chars_format::fixed
                                   : kind == 'e' ? std::chars_format::scientific
                                                 : std::chars_format::general;
  std::string text(static_cast<std::size_t>(precision) + 400, '\0');
  text.resize(static_cast<std::size_t>(
      std::to_chars(text.data(), text.data() + text.size(), value, format, precision).ptr - text.data()));
  return text;
#else
  std::ostringstream stream;
  stream.imbue(std::locale::classic());
  stream.precision(kind == 'g' && precision == 0 ? 1 : precision);
  if (kind == 'f') stream << std::fixed;
  if (kind == 'e') stream << std::scientific;
  stream << value;
  return stream.str();
#endif
}

namespace {

std::string upper_case(std::string text) {
  for (char& letter : text) {
    if (letter >= 'a' && letter <= 'z') letter = static_cast<char>(letter - 32);
  }
  return text;
}

std::string in_base(std::int64_t value, int base) {
  char digits[72];
  const std::uint64_t size = value < 0 ? 0 - static_cast<std::uint64_t>(value) : static_cast<std::uint64_t>(value);
  return {digits, std::to_chars(digits, digits + sizeof digits, size, base).ptr};
}

// How a value is written in a field.
struct Field {
  std::string fill = " ";
  char align = 0;  // of "<>=^"; 0 where none is given
  char sign = '-';
  bool alternate = false;
  bool zero = false;
  char grouping = 0;
  std::int64_t width = 0;
  std::int64_t precision = -1;
  char type = 0;
};

// Text with padding. `sign`: what stays before the padding of "=".
std::string padded(const Field& field, const std::string& sign, const std::string& body, char align) {
  const std::size_t size = count_characters(sign) + count_characters(body);
  const std::size_t room = field.width > static_cast<std::int64_t>(size) ? static_cast<std::size_t>(field.width) - size
                                                                         : 0;
  const std::size_t before = align == '>' || align == '=' ? room : align == '^' ? room / 2 : 0;
  Writer out;
  if (align == '=') out.add(sign);
  out.repeat(field.fill, before);
  if (align != '=') out.add(sign);
  out.add(body);
  out.repeat(field.fill, room - before);
  return std::move(out.text);
}

std::string sign_of(bool negative, char sign) { return negative ? "-" : sign == '+' ? "+" : sign == ' ' ? " " : ""; }

std::string limited(const std::string& text, std::int64_t characters) {
  if (characters < 0) return text;
  const Text whole(text);
  return text.substr(0, byte_of(whole, static_cast<std::size_t>(characters)));
}

std::string float_text(double value, char type, std::int64_t precision, bool alternate) {
  if (precision > 100'000) unsupported("more than 100000 digits of a float");
  const char kind = static_cast<char>(type | 0x20);
  std::string text = printed(std::fabs(value), kind, precision < 0 ? 6 : static_cast<int>(precision), alternate);
  return type < 'a' ? upper_case(std::move(text)) : text;
}

double as_float(const Value& value) {
  if (value.is_undefined()) value.as<Undefined>()->fail();
  if (!value.is_number()) raise_error("TypeError", "must be real number, not ", type_name(value));
  return value.real();
}

std::int64_t whole(double value) {
  if (std::isnan(value)) raise_error("ValueError", "cannot convert float NaN to integer");
  if (std::isinf(value)) raise_error("OverflowError", "cannot convert float infinity to integer");
  if (std::fabs(value) >= 9.2e18) unsupported("integers beyond 64 bits");
  return static_cast<std::int64_t>(value);
}

std::string one_character(const Value& value) {
  if (value.is_string() && value.as<Text>()->length() == 1) return value.string();
  if (!value.is_integral()) raise_error("TypeError", "%c requires int or char");
  if (value.integer() < 0 || value.integer() > 0x10FFFF) {
    raise_error("OverflowError", "%c arg not in range(0x110000)");
  }
  if (value.integer() >= 0xD800 && value.integer() < 0xE000) unsupported("lone surrogates");
  std::string text;
  append_utf8(text, static_cast<char32_t>(value.integer()));
  return text;
}

// One rendering of format % right.
class Percent {
 public:
  Percent(const std::string& format, const Value& right) : format_(format), right_(right) {
    mapping_ = right.is(Type::kDict) || right.is(Type::kList) || right.is(Type::kRange) || right.is_undefined();
  }

  std::string run() {
    while (at_ < format_.size()) {
      const std::size_t end = std::min(format_.find('%', at_), format_.size());
      out_.add(std::string_view(format_).substr(at_, end - at_));
      at_ = end + 1;
      if (end < format_.size()) conversion();
    }
    const bool left = right_.is(Type::kTuple) ? used_ < right_.items().size() : used_ == 0;
    if (left && !mapping_) raise_error("TypeError", "not all arguments converted during string formatting");
    return std::move(out_.text);
  }

 private:
  char letter() {
    if (at_ >= format_.size()) raise_error("ValueError", "incomplete format");
    return format_[at_];
  }

  const Value& next() {
    if (keyed_) return key_value_;
    const bool tuple = right_.is(Type::kTuple);
    if (used_ >= (tuple ? right_.items().size() : 1)) {
      raise_error("TypeError", "not enough arguments for format string");
    }
    const std::size_t place = used_++;
    return tuple ? right_.items()[place] : right_;
  }

  void key() {
    keyed_ = false;
    if (letter() != '(') return;
    if (!mapping_) raise_error("TypeError", "format requires a mapping");
    std::size_t end = at_ + 1;
    for (int open = 1; open > 0; ++end) {
      if (end >= format_.size()) raise_error("ValueError", "incomplete format key");
      open += format_[end] == '(' ? 1 : format_[end] == ')' ? -1 : 0;
    }
    const Value name(format_.substr(at_ + 1, end - at_ - 2));
    if (right_.is_undefined()) right_.as<Undefined>()->fail();
    if (!item_at(right_, name, key_value_)) {
      if (!right_.is(Type::kDict)) raise_error("TypeError", "list indices must be integers or slices, not str");
      raise_error("KeyError", repr_of(name));
    }
    at_ = end;
    keyed_ = true;
  }

  std::int64_t size() {
    if (letter() == '*') {
      ++at_;
      const Value& value = next();
      if (!value.is_integral()) raise_error("TypeError", "* wants int");
      return value.integer();
    }
    std::int64_t result = 0;
    for (; letter() >= '0' && letter() <= '9'; ++at_) {
      result = result * 10 + (letter() - '0');
      if (result > INT32_MAX) raise_error("ValueError", "width too big");
    }
    return result;
  }

  void conversion() {
    Field field;
    key();
    bool left = false;
    for (;; ++at_) {
      const char flag = letter();
      if (flag == '-') left = true;
      else if (flag == '+') field.sign = '+';
      else if (flag == ' ') field.sign = field.sign == '+' ? '+' : ' ';
      else if (flag == '#') field.alternate = true;
      else if (flag == '0') field.zero = true;
      else break;
    }
    field.width = size();
    if (field.width < 0) {
      left = true;
      field.width = field.width == INT64_MIN ? INT64_MAX : -field.width;
    }
    if (letter() == '.') {
      ++at_;
      field.precision = std::max<std::int64_t>(size(), 0);
    }
    if (letter() == 'h' || letter() == 'l' || letter() == 'L') ++at_;
    field.type = letter();
    ++at_;
    if (field.type == '%') out_.add("%");
    else write(field, left);
  }

  void write(Field& field, bool left) {
    const Value& value = next();
    std::string sign, body;
    bool number = true;
    switch (field.type) {
      case 's':
      case 'r':
        number = false;
        body = limited(field.type == 's' ? text_of_value(value) : repr_of(value), field.precision);
        break;
      case 'c':
        number = false;
        body = one_character(value);
        break;
      case 'd':
      case 'i':
      case 'u':
      case 'x':
      case 'X':
      case 'o': integer(field, value, sign, body); break;
      case 'e':
      case 'E':
      case 'f':
      case 'F':
      case 'g':
      case 'G': {
        const double real = as_float(value);
        sign = sign_of(std::signbit(real) && !std::isnan(real), field.sign);
        body = float_text(real, field.type, field.precision, field.alternate);
        break;
      }
      case 'a': unsupported("the conversion %a");
      default: raise_error("ValueError", "unsupported format character '", std::string_view(&field.type, 1), "'");
    }
    if (number && field.zero && !left) {
      field.fill = "0";
      out_.add(padded(field, sign, body, '='));
    } else {
      out_.add(padded(field, sign, body, left ? '<' : '>'));
    }
  }

  static void integer(const Field& field, const Value& value, std::string& sign, std::string& body) {
    const char type = field.type;
    const bool decimal = type == 'd' || type == 'i' || type == 'u';
    if (value.is_undefined()) value.as<Undefined>()->fail();
    if (!value.is_integral() && !(decimal && value.is(Type::kFloat))) {
      raise_error("TypeError", "%", std::string_view(&type, 1), " format: ", decimal ? "a real number" : "an integer",
                  " is required, not ", type_name(value));
    }
    const std::int64_t number = value.is_integral() ? value.integer() : whole(value.real());
    const std::string digits = in_base(number, decimal ? 10 : type == 'o' ? 8 : 16);
    Writer out;
    if (field.precision > static_cast<std::int64_t>(digits.size())) {
      out.repeat("0", static_cast<std::size_t>(field.precision) - digits.size());
    }
    out.add(digits);
    sign = sign_of(number < 0, field.sign);
    if (field.alternate && !decimal) sign += type == 'o' ? "0o" : type == 'x' ? "0x" : "0X";
    body = type == 'X' ? upper_case(std::move(out.text)) : std::move(out.text);
  }

  const std::string& format_;
  const Value& right_;
  Writer out_;
  std::size_t at_ = 0, used_ = 0;
  bool mapping_ = false, keyed_ = false;
  Value key_value_;
};

Field read_spec(const std::string& spec, const Value& value) {
  Field field;
  std::size_t at = 0;
  const auto letter = [&]() -> char { return at < spec.size() ? spec[at] : '\0'; };
  const auto is_align = [](char c) { return c == '<' || c == '>' || c == '=' || c == '^'; };
  std::size_t after = 0;
  if (!spec.empty()) next_character(spec, after);
  if (after > 0 && after < spec.size() && is_align(spec[after])) {
    field.fill = spec.substr(0, after);
    field.align = spec[after];
    at = after + 1;
  } else if (is_align(letter())) {
    field.align = spec[at++];
  }
  if (letter() == '+' || letter() == '-' || letter() == ' ') field.sign = spec[at++];
  if (letter() == 'z') unsupported("'z' in a format");
  if (letter() == '#') {
    field.alternate = true;
    ++at;
  }
  if (letter() == '0') {
    field.zero = true;
    ++at;
    if (after == 0 || field.fill == " ") field.fill = field.align == 0 ? "0" : field.fill;
    if (field.align == 0 && !value.is_string()) field.align = '=';
  }
  const auto number = [&](const char* error) {
    std::int64_t result = 0;
    for (; letter() >= '0' && letter() <= '9'; ++at) {
      result = result * 10 + (letter() - '0');
      if (result > INT32_MAX) raise_error("ValueError", error);
    }
    return result;
  };
  field.width = number("Too many decimal digits in format string");
  if (letter() == ',' || letter() == '_') field.grouping = spec[at++];
  if (letter() == '.') {
    ++at;
    if (letter() < '0' || letter() > '9') raise_error("ValueError", "Format specifier missing precision");
    field.precision = number("precision too big");
  }
  if (at + 1 < spec.size()) {
    raise_error("ValueError", "Invalid format specifier '", spec, "' for object of type '", type_name(value), "'");
  }
  field.type = letter();
  return field;
}

std::string grouped(const std::string& digits, char separator) {
  const std::size_t whole = std::min(digits.find_first_not_of("0123456789"), digits.size());
  std::string result;
  for (std::size_t i = 0; i < whole; ++i) {
    if (i > 0 && (whole - i) % 3 == 0) result += separator;
    result += digits[i];
  }
  return result + digits.substr(whole);
}

[[noreturn]] void unknown_code(const Field& field, const Value& value) {
  raise_error("ValueError", "Unknown format code '", std::string_view(&field.type, 1), "' for object of type '",
              type_name(value), "'");
}

std::string format_number(Field& field, const Value& value) {
  const char type = field.type;
  std::string sign, body;
  const bool real = value.is(Type::kFloat) ||
                    (type != 0 && std::string_view("eEfFgG%").find(type) != std::string::npos);
  if (type == 'n' || type == 'c') unsupported("the format '", std::string_view(&type, 1), "'");
  if (real) {
    const double number = type == '%' ? value.real() * 100 : value.real();
    sign = sign_of(std::signbit(number) && !std::isnan(number), field.sign);
    if (type == 0) {
      if (field.precision >= 0) unsupported("the format of a float with a precision but no type");
      body = python_repr(std::fabs(number));
    } else if (std::string_view("eEfFgG%").find(type) != std::string::npos) {
      body = float_text(number, type == '%' ? 'f' : type, field.precision, field.alternate);
      if (type == '%') body += '%';
    } else {
      unknown_code(field, value);
    }
  } else {
    if (field.precision >= 0) raise_error("ValueError", "Precision not allowed in integer format specifier");
    if (type != 0 && std::string_view("bdoxX").find(type) == std::string::npos) unknown_code(field, value);
    const int base = type == 'b' ? 2 : type == 'o' ? 8 : type == 'x' || type == 'X' ? 16 : 10;
    if (field.grouping != 0 && base != 10) unsupported("',' and '_' in the format of other bases than 10");
    sign = sign_of(value.integer() < 0, field.sign);
    if (field.alternate && base != 10) sign += concat("0", std::string_view(&type, 1));
    body = in_base(value.integer(), base);
    if (type == 'X') body = upper_case(body);
  }
  if (field.grouping != 0) {
    if (field.fill == "0" && field.align == '=') unsupported("',' and '_' in a format with zeros before the number");
    body = grouped(body, field.grouping);
  }
  return padded(field, sign, body, field.align == 0 ? '>' : field.align);
}

}  // namespace

std::string percent_format(const std::string& format, const Value& right) { return Percent(format, right).run(); }

std::string format_value(const Value& value, const std::string& spec) {
  if (spec.empty()) return text_of_value(value);
  if (!value.is_string() && !value.is_number()) {
    raise_error("TypeError", "unsupported format string passed to ", type_name(value), ".__format__");
  }
  Field field = read_spec(spec, value);
  if (value.is_number()) return format_number(field, value);
  if (field.type != 0 && field.type != 's') unknown_code(field, value);
  if (field.sign != '-') raise_error("ValueError", "Sign not allowed in string format specifier");
  if (field.alternate) raise_error("ValueError", "Alternate form (#) not allowed in string format specifier");
  if (field.align == '=') raise_error("ValueError", "'=' alignment not allowed in string format specifier");
  if (field.grouping != 0) raise_error("ValueError", "Cannot specify ',' with 's'.");
  return padded(field, "", limited(value.string(), field.precision), field.align == 0 ? '<' : field.align);
}

}  // namespace edgelm::capi::chat
