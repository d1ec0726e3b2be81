// Categories, other properties and case of characters.
#include <algorithm>

#include "capi/common/unicode.h"
#include "capi/common/unicode/tables.h"

namespace edgelm::capi {

namespace unicode {

const Record& record_of(char32_t character) {
  if (character > 0x10ffff) character = 0x10ffff;
  const std::size_t block = character >> 8;
  const std::size_t last = size_of(kBlocks) - 1;
  const std::uint32_t* begin = kStarts + kBlocks[std::min(block, last)];
  const std::uint32_t* end = block < last ? kStarts + kBlocks[block + 1] + 1 : kStarts + size_of(kStarts);
  return kRecords[*(std::upper_bound(begin, end, character << 8 | 0xff) - 1) & 0xff];
}

namespace {

bool has(char32_t character, int flags) { return (record_of(character).flags & flags) != 0; }

constexpr char kNames[] = "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCsCoCn";

// A case: its runs and special maps.
struct Map {
  const CaseRun* runs;
  std::size_t num_runs;
  const CaseSpecial* special;
  std::size_t num_special;

  // Append what the character maps to; false if it has no entry.
  bool append(std::u32string& text, char32_t character) const {
    const CaseSpecial* found = std::lower_bound(special, special + num_special, character,
                                                [](const CaseSpecial& a, char32_t b) { return a.character < b; });
    if (found != special + num_special && found->character == character) {
      for (const std::uint16_t part : found->text) {
        if (part != 0) text += part;
      }
      return true;
    }
    const CaseRun* run = std::upper_bound(runs, runs + num_runs, character,
                                          [](char32_t a, const CaseRun& b) { return a < b.first; });
    if (run == runs) return false;
    --run;
    if (character > run->last || (character - run->first) % run->step != 0) return false;
    text += static_cast<char32_t>(static_cast<std::int64_t>(character) + run->distance);
    return true;
  }
};

constexpr Map kLower = {kLowerRuns, size_of(kLowerRuns), kLowerSpecial, size_of(kLowerSpecial)};
constexpr Map kUpper = {kUpperRuns, size_of(kUpperRuns), kUpperSpecial, size_of(kUpperSpecial)};
constexpr Map kTitle = {kTitleRuns, size_of(kTitleRuns), kTitleSpecial, size_of(kTitleSpecial)};

bool is_cased(char32_t character) {
  return has(character, kUppercase | kLowercase) || category(character) == Category::kTitleLetter;
}

// Whether a capital sigma at `at` ends a word: a cased character is before it and none after it, apart from what case
// ignores.
bool is_final_sigma(const std::u32string& text, std::size_t at) {
  std::size_t before = at;
  while (before > 0 && has(text[before - 1], kCaseIgnorable)) --before;
  if (before == 0 || !is_cased(text[before - 1])) return false;
  std::size_t after = at + 1;
  while (after < text.size() && has(text[after], kCaseIgnorable)) ++after;
  return after == text.size() || !is_cased(text[after]);
}

void append_lower_at(std::u32string& result, const std::u32string& text, std::size_t at) {
  if (text[at] == U'\u03a3') {
    result += is_final_sigma(text, at) ? U'\u03c2' : U'\u03c3';
  } else {
    append_lower(result, text[at]);
  }
}

void append_upper(std::u32string& text, char32_t character) {
  if (!kUpper.append(text, character)) text += character;
}

void append_title(std::u32string& text, char32_t character) {
  if (!kTitle.append(text, character)) append_upper(text, character);
}

}  // namespace
}  // namespace unicode

using unicode::has;

Category category(char32_t character) { return static_cast<Category>(unicode::record_of(character).category); }

const char* category_name(Category category) {
  static const auto names = [] {
    std::string all;
    for (std::size_t i = 0; i + 1 < sizeof(unicode::kNames); i += 2) {
      all.append(unicode::kNames + i, 2);
      all += '\0';
    }
    return all;
  }();
  return names.c_str() + 3 * static_cast<std::size_t>(category);
}

std::optional<Category> category_of_name(std::string_view name) {
  if (name.size() != 2) return {};
  for (std::size_t i = 0; i + 1 < sizeof(unicode::kNames); i += 2) {
    if (name == std::string_view(unicode::kNames + i, 2)) return static_cast<Category>(i / 2);
  }
  return {};
}

namespace {

bool between(char32_t character, Category first, Category last) {
  const Category found = category(character);
  return first <= found && found <= last;
}

}  // namespace

bool is_letter(char32_t character) { return between(character, Category::kUpperLetter, Category::kOtherLetter); }
bool is_mark(char32_t character) { return between(character, Category::kNonspacingMark, Category::kEnclosingMark); }
bool is_number(char32_t character) { return between(character, Category::kDecimalNumber, Category::kOtherNumber); }
bool is_punctuation(char32_t character) {
  return between(character, Category::kConnectorPunctuation, Category::kOtherPunctuation);
}
bool is_symbol(char32_t character) { return between(character, Category::kMathSymbol, Category::kOtherSymbol); }

bool is_white_space(char32_t character) {
  if (character < 0x85) return character == ' ' || (character >= '\t' && character <= '\r');
  return character == 0x85 || between(character, Category::kSpaceSeparator, Category::kParagraphSeparator);
}

bool is_python_space(char32_t character) {
  return is_white_space(character) || (character >= 0x1c && character <= 0x1f);
}

bool is_alphabetic(char32_t character) { return has(character, unicode::kAlphabetic); }

bool is_word(char32_t character) {
  if (character == 0x200c || character == 0x200d) return true;
  const Category found = category(character);
  return found == Category::kDecimalNumber || found == Category::kConnectorPunctuation || is_mark(character) ||
         is_alphabetic(character);
}

bool is_oniguruma_word(char32_t character) {
  switch (character) {
    case 0x200c:
    case 0x200d: return false;
    case 0xb2:
    case 0xb3:
    case 0xb9:
    case 0xbc:
    case 0xbd:
    case 0xbe: return true;
    default: return is_word(character);
  }
}

bool is_rust_punctuation(char32_t character) { return has(character, unicode::kRustPunctuation); }
bool is_rust_numeric(char32_t character) { return has(character, unicode::kRustNumeric); }
bool is_stripped_mark(char32_t character) { return has(character, unicode::kStrippedMark); }

bool is_printable(char32_t character) { return character == ' ' || category(character) < Category::kSpaceSeparator; }

bool is_upper(char32_t character) { return has(character, unicode::kUppercase); }
bool is_lower(char32_t character) { return has(character, unicode::kLowercase); }

void append_lower(std::u32string& text, char32_t character) {
  if (!unicode::kLower.append(text, character)) text += character;
}

std::string to_lower(std::string_view text) {
  const std::u32string characters = to_characters(text);
  std::u32string result;
  for (std::size_t at = 0; at < characters.size(); ++at) unicode::append_lower_at(result, characters, at);
  return to_utf8(result);
}

std::string to_upper(std::string_view text) {
  std::u32string result;
  for (const char32_t character : to_characters(text)) unicode::append_upper(result, character);
  return to_utf8(result);
}

std::string to_title(std::string_view text) {
  const std::u32string characters = to_characters(text);
  std::u32string result;
  bool within = false;
  for (std::size_t at = 0; at < characters.size(); ++at) {
    if (within) {
      unicode::append_lower_at(result, characters, at);
    } else {
      unicode::append_title(result, characters[at]);
    }
    within = unicode::is_cased(characters[at]);
  }
  return to_utf8(result);
}

std::string capitalized(std::string_view text) {
  const std::u32string characters = to_characters(text);
  std::u32string result;
  for (std::size_t at = 0; at < characters.size(); ++at) {
    if (at == 0) {
      unicode::append_title(result, characters[at]);
    } else {
      unicode::append_lower_at(result, characters, at);
    }
  }
  return to_utf8(result);
}

}  // namespace edgelm::capi
