#include "capi/common/unicode.h"

namespace edgelm::capi {

namespace {

constexpr const char* kReplacement = "\xef\xbf\xbd";  // U+FFFD

// Bytes of a character by its first byte; 0 if no character begins with it.
int length_of(unsigned char first) {
  if (first < 0x80) return 1;
  if (first < 0xc2) return 0;  // continuation bytes, and overlong forms of ASCII
  if (first < 0xe0) return 2;
  if (first < 0xf0) return 3;
  return first < 0xf5 ? 4 : 0;
}

// Whether `second` may follow `first`: excludes overlong forms, surrogates, and what lies beyond U+10FFFF.
bool may_follow(unsigned char first, unsigned char second) {
  const unsigned char low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  const unsigned char high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  return second >= low && second <= high;
}

struct Subpart {
  std::size_t size;  // at least 1
  bool complete;     // a whole character
  bool cut;          // the text ends in it
};

// The character at `at`, or the longest part of one that is there.
Subpart subpart(std::string_view text, std::size_t at) {
  const unsigned char first = text[at];
  const std::size_t length = length_of(first);
  if (length == 0) return {1, false, false};
  std::size_t size = 1;
  while (size < length && at + size < text.size()) {
    const unsigned char byte = text[at + size];
    if (size == 1 ? !may_follow(first, byte) : (byte & 0xc0) != 0x80) return {size, false, false};
    ++size;
  }
  return {size, size == length, size < length};
}

}  // namespace

std::size_t valid_utf8_prefix(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    if (static_cast<unsigned char>(text[at]) < 0x80) {
      ++at;
      continue;
    }
    const Subpart part = subpart(text, at);
    if (!part.complete) break;
    at += part.size;
  }
  return at;
}

char32_t next_character(std::string_view text, std::size_t& at) {
  const unsigned char first = text[at++];
  if (first < 0x80) return first;
  const int length = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  char32_t character = first & (0x7f >> length);
  for (int i = 1; i < length && at < text.size(); ++i) character = character << 6 | (text[at++] & 0x3f);
  return character;
}

void append_utf8(std::string& text, char32_t character) {
  if (character < 0x80) {
    text += static_cast<char>(character);
    return;
  }
  const int following = character < 0x800 ? 1 : character < 0x10000 ? 2 : 3;
  text += static_cast<char>((0xff00 >> (following + 1) & 0xff) | character >> (6 * following));
  for (int i = following - 1; i >= 0; --i) text += static_cast<char>(0x80 | (character >> (6 * i) & 0x3f));
}

std::u32string to_characters(std::string_view utf8) {
  std::u32string characters;
  characters.reserve(utf8.size());
  for (std::size_t at = 0; at < utf8.size();) characters += next_character(utf8, at);
  return characters;
}

std::string to_utf8(std::u32string_view characters) {
  std::string text;
  text.reserve(characters.size());
  for (const char32_t character : characters) append_utf8(text, character);
  return text;
}

std::string Utf8Stream::push(std::string_view bytes) {
  held_ += bytes;
  std::string text;
  text.reserve(held_.size());
  std::size_t at = 0;
  while (at < held_.size()) {
    const Subpart part = subpart(held_, at);
    if (part.cut) break;
    part.complete ? text.append(held_, at, part.size) : text.append(kReplacement);
    at += part.size;
  }
  held_.erase(0, at);
  return text;
}

std::string Utf8Stream::flush() {
  const bool incomplete = !held_.empty();
  held_.clear();
  return incomplete ? kReplacement : "";
}

}  // namespace edgelm::capi
