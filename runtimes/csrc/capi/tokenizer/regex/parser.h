// Regular expressions to programs: see regex.h.
#pragma once

#include <string>
#include <vector>

#include "capi/tokenizer/regex/regex.h"

namespace edgelm::capi {

class RegexParser {
 public:
  explicit RegexParser(std::string_view pattern);
  // Compile the pattern. Throws Error(EDGELM_TOKENIZER).
  void compile();

  std::vector<Regex::Instruction> program;
  std::vector<CharacterClass> classes;

 private:
  static constexpr std::uint32_t kUnbounded = UINT32_MAX;

  struct Node {
    enum Kind { kEmpty, kClass, kJoin, kChoice, kRepeat, kGroup, kAssert } kind = kEmpty;
    std::uint32_t index = 0;  // of a class
    std::vector<Node> parts;
    std::uint32_t low = 0, high = 0;  // of a repetition
    bool lazy = false, possessive = false;
    Regex::Instruction::Kind assertion = Regex::Instruction::kEnd;  // of kGroup and kAssert
  };

  [[noreturn]] void refuse(const std::string& what) const;
  bool more() const { return at_ < pattern_.size(); }
  char32_t peek(std::size_t ahead = 0) const { return at_ + ahead < pattern_.size() ? pattern_[at_ + ahead] : U'\0'; }
  bool take(std::u32string_view text);
  bool take(char32_t character) { return take(std::u32string_view(&character, 1)); }

  Node choice();
  Node join();
  Node atom();
  Node group();
  Node options(bool& ignore_case);
  Node escape();
  Node literal(char32_t character);
  Node quantified(Node node);
  bool bounds(std::uint32_t& low, std::uint32_t& high);
  Node one_of(CharacterClass set);
  Node assertion(Regex::Instruction::Kind kind) const;

  CharacterClass bracket();
  void bracket_part(CharacterClass& set);
  bool class_escape(char32_t letter, CharacterClass& set);
  void property(bool negated, CharacterClass& set);
  char32_t escaped_character();
  char32_t hexadecimal(int digits);
  void add_character(CharacterClass& set, char32_t character) const;

  void emit(const Node& node);
  void emit_repeat(const Node& node);
  std::uint32_t put(Regex::Instruction instruction);
  static bool may_be_empty(const Node& node);
  // Characters that a node always has; refuses those of a varying number.
  std::uint32_t width(const Node& node) const;

  std::u32string pattern_;
  std::size_t at_ = 0;
  int depth_ = 0;
  bool ignore_case_ = false, dot_all_ = false;
  char32_t before_ = 0;  // the literal before, if its case is ignored
};

}  // namespace edgelm::capi
