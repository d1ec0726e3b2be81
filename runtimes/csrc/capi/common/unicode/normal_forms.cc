// Unicode normal forms: UAX #15, of the version that the `tokenizers` library has.
#include <algorithm>
#include <tuple>

#include "capi/common/unicode.h"
#include "capi/common/unicode/tables.h"

namespace edgelm::capi {

namespace {

using namespace unicode;

// Hangul syllables are computed.
constexpr char32_t kSyllables = 0xac00, kLeads = 0x1100, kVowels = 0x1161, kTrails = 0x11a7;
constexpr char32_t kNumLeads = 19, kNumVowels = 21, kNumTrails = 28;
constexpr char32_t kNumSyllables = kNumLeads * kNumVowels * kNumTrails;

// Characters below this have neither combining classes nor canonical decompositions.
constexpr char32_t kFirstCanonical = 0xc0, kFirstCompatible = 0xa0;

// Append the decomposition of this kind (0 canonical, 1 compatibility); false where there is none.
bool append_decomposition(std::u32string& text, char32_t character, std::uint32_t kind) {
  // Ranges are sorted by kind & 1 only within the two parts of the table, which is found by the first compatibility one.
  static const std::size_t canonical = [] {
    std::size_t count = 0;
    while (count < size_of(kDecomposed) && (kDecomposed[count].key & 1) == 0) ++count;
    return count;
  }();
  const Decomposed* begin = kDecomposed + (kind == 0 ? 0 : canonical);
  const Decomposed* end = kind == 0 ? kDecomposed + canonical : kDecomposed + size_of(kDecomposed);
  const Decomposed* range = std::upper_bound(begin, end, character,
                                             [](char32_t a, const Decomposed& b) { return a < b.key >> 2; });
  if (range == begin) return false;
  --range;
  const char32_t offset = character - (range->key >> 2);
  if (offset >= range->count) return false;
  const std::uint16_t value = kDecomposedValues[range->values + offset];
  if (range->key & 2) {
    text += value;
    return true;
  }
  const char16_t* units = kDecomposedTexts + value;
  for (std::size_t i = 1, size = units[0]; i <= size; ++i) {
    char32_t unit = units[i];
    if (unit >= 0xd800 && unit < 0xdc00 && i < size) unit = 0x10000 + ((unit - 0xd800) << 10) + (units[++i] - 0xdc00);
    text += unit;
  }
  return true;
}

void append_decomposed(std::u32string& text, char32_t character, bool compatible) {
  if (character < (compatible ? kFirstCompatible : kFirstCanonical)) {
    text += character;
  } else if (character - kSyllables < kNumSyllables) {
    const char32_t index = character - kSyllables;
    text += kLeads + index / (kNumVowels * kNumTrails);
    text += kVowels + index / kNumTrails % kNumVowels;
    if (index % kNumTrails != 0) text += kTrails + index % kNumTrails;
  } else if (!(compatible && append_decomposition(text, character, 1)) && !append_decomposition(text, character, 0)) {
    text += character;
  }
}

std::uint8_t class_of(char32_t character) { return character < 0x300 ? 0 : record_of(character).combining_class; }

// Sort each run of combining marks by class.
void reorder(std::u32string& text) {
  const auto less = [](char32_t a, char32_t b) { return class_of(a) < class_of(b); };
  for (std::size_t at = 0; at < text.size();) {
    if (class_of(text[at]) == 0) {
      ++at;
      continue;
    }
    std::size_t end = at;
    while (end < text.size() && class_of(text[end]) != 0) ++end;
    std::stable_sort(text.begin() + at, text.begin() + end, less);
    at = end;
  }
}

template <class Row, std::size_t N>
char32_t find_composite(const Row (&rows)[N], char32_t first, char32_t second) {
  const Row* row = std::lower_bound(rows, rows + N, std::make_pair(first, second), [](const Row& a, const auto& b) {
    return std::make_pair<char32_t, char32_t>(a.first, a.second) < b;
  });
  return row != rows + N && row->first == first && row->second == second ? row->composite : 0;
}

// The composite of two characters; 0 where there is none.
char32_t composite(char32_t first, char32_t second) {
  if (first - kLeads < kNumLeads && second - kVowels < kNumVowels) {
    return kSyllables + ((first - kLeads) * kNumVowels + (second - kVowels)) * kNumTrails;
  }
  if (first - kSyllables < kNumSyllables && (first - kSyllables) % kNumTrails == 0 &&
      second - kTrails - 1 < kNumTrails - 1) {
    return first + (second - kTrails);
  }
  if (second < 0x300) return 0;
  return first < 0x10000 && second < 0x10000 ? find_composite(kComposed, first, second)
                                             : find_composite(kComposedWide, first, second);
}

void compose(std::u32string& text) {
  constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  std::size_t starter = kNone, size = 0;
  int last_class = -1;  // of the last character kept after the starter
  for (const char32_t character : text) {
    const int number = class_of(character);
    if (starter != kNone && last_class < number) {
      const char32_t found = composite(text[starter], character);
      if (found != 0) {
        text[starter] = found;
        continue;
      }
    }
    if (number == 0) {
      starter = size;
      last_class = -1;
    } else {
      last_class = number;
    }
    text[size++] = character;
  }
  text.resize(size);
}

// Whether no form changes the text: ASCII, and for canonical forms all below U+00C0.
bool is_unchanged(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

}  // namespace

std::string normalized(std::string_view text, Form form) {
  if (is_unchanged(text)) return std::string(text);
  const bool compatible = form == Form::NFKC || form == Form::NFKD;
  std::u32string result;
  for (std::size_t at = 0; at < text.size();) append_decomposed(result, next_character(text, at), compatible);
  reorder(result);
  if (form == Form::NFC || form == Form::NFKC) compose(result);
  return to_utf8(result);
}

}  // namespace edgelm::capi
