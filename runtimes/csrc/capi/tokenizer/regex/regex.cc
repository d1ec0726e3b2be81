#include "capi/tokenizer/regex/regex.h"

#include <algorithm>

#include "capi/common/error.h"
#include "capi/tokenizer/regex/parser.h"

namespace edgelm::capi {

namespace {

constexpr std::size_t kFailed = std::string_view::npos;
// Steps for each byte of a text. Published patterns need up to 30.
constexpr std::uint64_t kStepsPerByte = 500, kLeastSteps = 20000000;
// Ways kept: a group that repeats needs one or two for each character.
constexpr std::size_t kWaysPerByte = 4, kLeastWays = 1 << 20;

std::size_t before(std::string_view text, std::size_t at) {
  do {
    --at;
  } while (at > 0 && (text[at] & 0xc0) == 0x80);
  return at;
}

}  // namespace

bool CharacterClass::slow_contains(char32_t character) const {
  bool found = (space && is_white_space(character)) || (word && is_oniguruma_word(character)) ||
               (categories != 0 && (categories >> static_cast<int>(category(character)) & 1) != 0);
  for (std::size_t i = 0; i < ranges.size() && !found; ++i) {
    found = character >= ranges[i].first && character <= ranges[i].second;
  }
  for (std::size_t i = 0; i < members.size() && !found; ++i) found = members[i].slow_contains(character);
  for (std::size_t i = 0; i < others.size() && found; ++i) found = others[i].slow_contains(character);
  return found != negated;
}

void CharacterClass::finish() {
  for (char32_t character = 0; character < 128; ++character) {
    if (slow_contains(character)) ascii[character >> 6] |= std::uint64_t{1} << (character & 63);
  }
}

Regex::Regex(std::string_view pattern) {
  RegexParser parser(pattern);
  parser.compile();
  program_ = std::move(parser.program);
  classes_ = std::move(parser.classes);
}

// Runs the program at one position after another, with the ways still to be tried on a stack.
struct Regex::Machine {
  // To continue at `pc` from `at`; if that is beyond `least`, then also from each character before down to it.
  struct Way {
    std::uint32_t pc;
    std::size_t at, least;
  };

  const Regex& regex;
  std::string_view text;
  std::uint64_t steps;
  std::vector<Way> ways;

  // The end of the first way that the program matches from `pc`; kFailed if none does.
  std::size_t run(std::uint32_t pc, std::size_t at) {
    const std::size_t base = ways.size();
    while (true) {
      if (steps-- == 0) too_long();
      const Instruction& step = regex.program_[pc];
      if (step.kind == Instruction::kEnd) {
        ways.resize(base);
        return at;
      }
      if (advance(step, pc, at)) continue;
      if (ways.size() == base) return kFailed;
      Way& way = ways.back();
      pc = way.pc;
      at = way.at;
      if (at > way.least) {
        way.at = before(text, at);
      } else {
        ways.pop_back();
      }
    }
  }

  [[noreturn]] static void too_long() {
    fail(EDGELM_TOKENIZER, "a regular expression of the tokenizer takes too long for this text");
  }

  // Execute one instruction; false if it does not match.
  bool advance(const Instruction& step, std::uint32_t& pc, std::size_t& at) {
    switch (step.kind) {
      case Instruction::kClass:
        ++pc;
        return at < text.size() && regex.classes_[step.x].contains(next_character(text, at));
      case Instruction::kRepeat:
      case Instruction::kAtomicRepeat: return repeat(step, pc, at);
      case Instruction::kSplit:
        if (ways.size() > kLeastWays + kWaysPerByte * text.size()) too_long();
        ways.push_back({step.y, at, at});
        pc = step.x;
        return true;
      case Instruction::kJump: pc = step.x; return true;
      case Instruction::kAtomic:
        at = run(pc + 1, at);
        pc = step.x;
        return at != kFailed;
      case Instruction::kAhead:
      case Instruction::kNotAhead: {
        const bool found = run(pc + 1, at) != kFailed;
        pc = step.x;
        return found == (step.kind == Instruction::kAhead);
      }
      case Instruction::kBehind:
      case Instruction::kNotBehind: {
        const bool found = behind(step, pc, at);
        pc = step.x;
        return found == (step.kind == Instruction::kBehind);
      }
      default: ++pc; return holds(step.kind, at);
    }
  }

  bool repeat(const Instruction& step, std::uint32_t& pc, std::size_t& at) {
    const CharacterClass& set = regex.classes_[step.x];
    std::uint32_t count = 0;
    std::size_t least = at;
    const std::size_t start = at;
    while (count < step.high && at < text.size()) {
      std::size_t next = at;
      if (!set.contains(next_character(text, next))) break;
      at = next;
      if (++count == step.low) least = at;
    }
    steps -= std::min<std::uint64_t>(steps, at - start);
    if (count < step.low) return false;
    ++pc;
    if (step.kind == Instruction::kRepeat && at > least) ways.push_back({pc, before(text, at), least});
    return true;
  }

  bool behind(const Instruction& step, std::uint32_t pc, std::size_t at) {
    std::size_t start = at;
    for (std::uint32_t i = 0; i < step.low; ++i) {
      if (start == 0) return false;
      start = before(text, start);
    }
    return run(pc + 1, start) != kFailed;
  }

  bool is_word_at(std::size_t at) const { return at < text.size() && is_oniguruma_word(next_character(text, at)); }

  bool holds(Instruction::Kind kind, std::size_t at) const {
    const bool at_end = at == text.size();
    switch (kind) {
      case Instruction::kTextStart: return at == 0;
      case Instruction::kTextEnd: return at_end;
      case Instruction::kTextEndOrNewline: return at_end || (at + 1 == text.size() && text[at] == '\n');
      case Instruction::kLineStart: return at == 0 || (text[at - 1] == '\n' && !at_end);
      case Instruction::kLineEnd: return at_end || text[at] == '\n';
      default: {
        const bool boundary = (at > 0 && is_word_at(before(text, at))) != is_word_at(at);
        return boundary == (kind == Instruction::kWordBoundary);
      }
    }
  }
};

std::vector<Regex::Match> Regex::find_all(std::string_view text) const {
  Machine machine{*this, text, kLeastSteps + kStepsPerByte * text.size(), {}};
  std::vector<Match> result;
  std::size_t at = 0;
  std::size_t last_end = kFailed;
  while (at <= text.size()) {
    const std::size_t end = machine.run(0, at);
    if (end != kFailed && (end != at || end != last_end)) {
      result.push_back({at, end});
      last_end = end;
      if (end > at) {
        at = end;
        continue;
      }
    }
    if (at == text.size()) break;
    next_character(text, at);
  }
  return result;
}

}  // namespace edgelm::capi
