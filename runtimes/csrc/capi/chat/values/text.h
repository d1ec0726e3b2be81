// Strings by characters, and the text of values.
#pragma once

#include <string>
#include <string_view>

#include "capi/chat/values/value.h"

namespace edgelm::capi::chat {

std::size_t count_characters(std::string_view text);
// The byte at which a character begins; the size if there are fewer characters.
std::size_t byte_of(const Text& text, std::size_t character);
// The characters of a slice, as Python takes them: text[start:stop:step] with resolved bounds.
std::string sliced(const Text& text, std::int64_t start, std::int64_t stop, std::int64_t step);
std::string character_at(const Text& text, std::size_t character);

// The character that ends before `at`, which is not 0; moves `at` to its beginning.
char32_t previous_character(std::string_view text, std::size_t& at);
std::string_view stripped(std::string_view text, bool left = true, bool right = true);

// Python's str() and repr() of a value. Writes to `out`, which is within the limits.
void write_text(Writer& out, const Value& value);
void write_repr(Writer& out, const Value& value);
std::string text_of_value(const Value& value);
std::string repr_of(const Value& value);
// The repr of a string.
std::string repr_of_text(std::string_view text);

// The beginning of a value's repr, for messages: at most 60 characters, whatever the value is.
std::string shown(const Value& value);

// Replaces &, <, >, ' and " by their names in HTML.
std::string escaped(std::string_view text);

// json.dumps(value, ...). `indent`: text of one level, or null for one line.
std::string json_text(const Value& value, bool ascii, const std::string* indent, const std::string& item_separator,
                      const std::string& key_separator, bool sorted);

}  // namespace edgelm::capi::chat
