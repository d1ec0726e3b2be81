#include "capi/parity/numbers/format.h"

#include <charconv>
#include <cmath>

namespace edgelm::capi {
namespace {

// Separate the thousands of the digits at the start of `text`, which may have a sign.
std::string with_separators(std::string text) {
  const std::size_t first = !text.empty() && text[0] == '-' ? 1 : 0;
  std::size_t end = first;
  while (end < text.size() && text[end] >= '0' && text[end] <= '9') ++end;
  for (std::size_t at = end; at > first + 3;) text.insert(at -= 3, ",");
  return text;
}

std::string written(double value, std::chars_format format, int digits) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char text[512];
  const auto result = std::to_chars(text, text + sizeof(text), value, format, digits);
  return std::string(text, result.ptr);
}

}  // namespace

std::string general(double value, int digits) { return written(value, std::chars_format::general, digits); }

std::string general_signed(double value, int digits) {
  const std::string text = general(value, digits);
  return text[0] == '-' ? text : "+" + text;
}

std::string grouped(std::int64_t value) { return with_separators(std::to_string(value)); }

std::string format_number(double value, int digits) {
  return with_separators(written(value, std::chars_format::fixed, std::abs(value) >= 1000 ? 0 : digits));
}

std::string python_quoted(std::string_view text) {
  const bool single = text.find('\'') != text.npos && text.find('"') == text.npos;
  const char quote = single ? '"' : '\'';
  std::string result(1, quote);
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == quote || c == '\\') {
      result += {'\\', c};
    } else if (c == '\n') {
      result += "\\n";
    } else if (c == '\r') {
      result += "\\r";
    } else if (c == '\t') {
      result += "\\t";
    } else if (byte < 0x20 || byte == 0x7f) {
      constexpr char digits[] = "0123456789abcdef";
      result += {'\\', 'x', digits[byte >> 4], digits[byte & 15]};
    } else {
      result += c;
    }
  }
  return result + quote;
}

}  // namespace edgelm::capi
