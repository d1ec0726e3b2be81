#include "capi/common/error.h"

#include "capi/common/unicode.h"

namespace edgelm::capi {

namespace {

constexpr std::size_t kShown = 60;  // characters, as in Python's messages

void append_escaped(std::string& text, unsigned char byte) {
  static const char digits[] = "0123456789abcdef";
  text += "\\x";
  text += digits[byte >> 4];
  text += digits[byte & 15];
}

}  // namespace

void Part::append_to(std::string& message) const {
  switch (kind_) {
    case kText: message += text_; return;
    case kSigned: message += std::to_string(static_cast<std::int64_t>(bits_)); return;
    case kUnsigned: message += std::to_string(bits_); return;
    case kReal: message += std::to_string(real_); return;
  }
}

std::string joined(const Part* parts, std::size_t count) {
  std::string message;
  for (std::size_t i = 0; i < count; ++i) parts[i].append_to(message);
  return message;
}

void fail_with(edgelm_code code, const Part* parts, std::size_t count) { throw Error(code, joined(parts, count)); }

std::string quoted(std::string_view text) {
  std::string result = "\"";
  std::size_t at = 0;
  for (std::size_t count = 0; at < text.size() && count < kShown; ++count) {
    const std::string_view rest = text.substr(at, 4);
    const unsigned char byte = text[at];
    if (valid_utf8_prefix(rest) == 0 || byte < 0x20 || byte == 0x7f) {
      append_escaped(result, byte);
      ++at;
    } else {
      if (byte == '"' || byte == '\\') result += '\\';
      append_utf8(result, next_character(text, at));
    }
  }
  result += at < text.size() ? "\"..." : "\"";
  return result;
}

}  // namespace edgelm::capi
