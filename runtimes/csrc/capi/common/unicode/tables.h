// The tables of tables.inc.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelm::capi::unicode {

// What is the same for many characters.
struct Record { std::uint8_t category, flags, combining_class; };
enum Flag : std::uint8_t {
  kAlphabetic = 1,
  kUppercase = 2,
  kLowercase = 4,
  kCaseIgnorable = 8,
  kRustPunctuation = 16,
  kStrippedMark = 32,
  kRustNumeric = 64
};

// Each `step`th character from `first` to `last` maps to the one `distance` away.
struct CaseRun {
  std::uint32_t first, last : 24, step : 8;
  std::int32_t distance;
};
// A character that maps to several; unused ones are 0.
struct CaseSpecial { std::uint16_t character, text[3]; };

// Characters with decompositions: `key` is the first one << 2 | kind. Kinds: 1 compatibility, 2 the values are
// characters.
struct Decomposed {
  std::uint32_t key;
  std::uint16_t count, values;
};
struct Composed { std::uint16_t first, second, composite; };
struct ComposedWide { std::uint32_t first, second, composite; };

// The rows have no braces around the array in each.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmissing-braces"
#include "capi/common/unicode/tables.inc"
#pragma GCC diagnostic pop

template <class T, std::size_t N>
constexpr std::size_t size_of(const T (&)[N]) {
  return N;
}

// Of the character; what is beyond U+10FFFF has no category.
const Record& record_of(char32_t character);

}  // namespace edgelm::capi::unicode
