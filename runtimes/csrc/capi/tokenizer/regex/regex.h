// Regular expressions as Oniguruma of the `tokenizers` library has them: the part that published tokenizers use. The rest
// is refused by name. Matching takes memory in proportion to the text, and stops with an error after a number of steps.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "capi/common/unicode.h"

namespace edgelm::capi {

// A set of characters: [a-z\p{L}&&[^x]].
struct CharacterClass {
  std::vector<std::pair<char32_t, char32_t>> ranges;  // inclusive
  std::uint32_t categories = 0;                       // a bit for each Category
  bool space = false, word = false;                   // \s and \w
  std::vector<CharacterClass> members;                // united with the above
  std::vector<CharacterClass> others;                 // the result is what is in all of these, too: &&
  bool negated = false;
  std::uint64_t ascii[2] = {};  // the result for ASCII, by `finish`

  bool contains(char32_t character) const {
    return character < 128 ? (ascii[character >> 6] >> (character & 63) & 1) != 0 : slow_contains(character);
  }
  void finish();

 private:
  bool slow_contains(char32_t character) const;
};

class Regex {
 public:
  // Throws Error(EDGELM_TOKENIZER) that names what is not supported.
  explicit Regex(std::string_view pattern);

  struct Match { std::size_t start, end; };
  // All matches in `text`, valid UTF-8, in order, as `find_iter` of the Rust crate `onig`: an empty match directly after
  // a match is left out. Throws Error(EDGELM_TOKENIZER) after too many steps.
  std::vector<Match> find_all(std::string_view text) const;

  struct Instruction {
    enum Kind : std::uint8_t {
      kClass,   // one character of `classes[x]`
      kRepeat,  // `low` to `high` of `classes[x]`, as many as possible; kAtomicRepeat gives none back
      kAtomicRepeat,
      kSplit,  // continue at x, or else at y
      kJump,   // continue at x
      kAhead,  // what follows until kEnd must match; continue at x. kNotAhead: must not
      kNotAhead,
      kBehind,  // the same for the `low` characters before
      kNotBehind,
      kAtomic,  // what follows until kEnd must match, and its first way counts; continue after it at x
      kLineStart,
      kLineEnd,
      kTextStart,
      kTextEnd,
      kTextEndOrNewline,
      kWordBoundary,
      kNoWordBoundary,
      kEnd
    };
    Kind kind;
    std::uint32_t x = 0, y = 0, low = 0, high = 0;
  };

 private:
  struct Machine;

  std::vector<Instruction> program_;
  std::vector<CharacterClass> classes_;
};

}  // namespace edgelm::capi
