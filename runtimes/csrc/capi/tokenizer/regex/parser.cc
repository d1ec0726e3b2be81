#include "capi/tokenizer/regex/parser.h"

#include <algorithm>

#include "capi/common/error.h"

namespace edgelm::capi {

namespace {

using Instruction = Regex::Instruction;

constexpr std::size_t kMaxPattern = 20000;
constexpr int kMaxDepth = 50;
constexpr std::uint32_t kMaxRepeats = 1000;

bool is_ascii_letter(char32_t character) { return (character | 32) >= 'a' && (character | 32) <= 'z'; }
bool is_digit(char32_t character) { return character >= '0' && character <= '9'; }

// What else Oniguruma takes for an ASCII letter if case is ignored; 0 if nothing.
char32_t other_case(char32_t letter) { return letter == 's' ? 0x17f : letter == 'k' ? 0x212a : 0; }

std::uint32_t bit(Category category) { return std::uint32_t{1} << static_cast<int>(category); }

// The categories of a name: "L", "Lu"; empty for another one.
std::optional<std::uint32_t> categories_of(const std::string& name) {
  if (const auto one = category_of_name(name)) return bit(*one);
  if (name.size() != 1) return {};
  std::uint32_t result = 0;
  for (int i = 0; i <= static_cast<int>(Category::kUnassigned); ++i) {
    if (category_name(static_cast<Category>(i))[0] == name[0]) result |= bit(static_cast<Category>(i));
  }
  if (result == 0) return {};
  return result;
}

}  // namespace

RegexParser::RegexParser(std::string_view pattern) : pattern_(to_characters(pattern)) {}

void RegexParser::compile() {
  if (pattern_.size() > kMaxPattern) refuse(concat("it has ", pattern_.size(), " characters"));
  const Node node = choice();
  if (more()) refuse("')' without '('");
  emit(node);
  put({Instruction::kEnd});
}

void RegexParser::refuse(const std::string& what) const {
  fail(EDGELM_TOKENIZER, "the regular expression ", quoted(to_utf8(pattern_)), " is not supported: ", what);
}

bool RegexParser::take(std::u32string_view text) {
  if (std::u32string_view(pattern_).substr(at_, text.size()) != text) return false;
  at_ += text.size();
  return true;
}

RegexParser::Node RegexParser::choice() {
  if (++depth_ > kMaxDepth) refuse(concat("groups within groups, more than ", kMaxDepth));
  const bool outer = ignore_case_, outer_dot = dot_all_;
  Node result;
  result.kind = Node::kChoice;
  do {
    result.parts.push_back(join());
  } while (take('|'));
  ignore_case_ = outer;
  dot_all_ = outer_dot;
  --depth_;
  if (result.parts.size() > 1) return result;
  Node only = std::move(result.parts[0]);
  return only;
}

RegexParser::Node RegexParser::join() {
  Node result;
  result.kind = Node::kJoin;
  before_ = 0;
  while (more() && peek() != '|' && peek() != ')') result.parts.push_back(quantified(atom()));
  before_ = 0;
  return result;
}

RegexParser::Node RegexParser::assertion(Instruction::Kind kind) const {
  Node result;
  result.kind = Node::kAssert;
  result.assertion = kind;
  return result;
}

RegexParser::Node RegexParser::one_of(CharacterClass set) {
  set.finish();
  Node result;
  result.kind = Node::kClass;
  result.index = static_cast<std::uint32_t>(classes.size());
  classes.push_back(std::move(set));
  return result;
}

RegexParser::Node RegexParser::atom() {
  const char32_t character = peek();
  if (character == '(') return group();
  if (character == '\\') return escape();
  if (character == '*' || character == '+' || character == '?') refuse("a repetition of nothing");
  if (character == '[') {
    before_ = 0;
    return one_of(bracket());
  }
  ++at_;
  if (character == '.') {
    CharacterClass set;
    if (!dot_all_) set.ranges = {{'\n', '\n'}};
    set.negated = true;
    return one_of(std::move(set));
  }
  if (character == '^') return assertion(Instruction::kLineStart);
  if (character == '$') return assertion(Instruction::kLineEnd);
  return literal(character);
}

RegexParser::Node RegexParser::literal(char32_t character) {
  if (ignore_case_) {
    // Oniguruma also takes single characters for these two: a ligature, or a sharp s.
    constexpr std::u32string_view kJoined[] = {U"ss", U"st", U"ff", U"fi", U"fl"};
    const char32_t small[] = {before_ | 32, character | 32};
    for (const std::u32string_view pair : kJoined) {
      if (pair == std::u32string_view(small, 2)) refuse("\"" + to_utf8(pair) + "\" where case is ignored");
    }
    before_ = character;
  }
  CharacterClass set;
  add_character(set, character);
  return one_of(std::move(set));
}

void RegexParser::add_character(CharacterClass& set, char32_t character) const {
  set.ranges.emplace_back(character, character);
  if (!ignore_case_) return;
  if (is_ascii_letter(character)) {
    set.ranges.emplace_back(character ^ 32, character ^ 32);
    if (const char32_t other = other_case(character | 32)) set.ranges.emplace_back(other, other);
  } else if (character >= 128 &&
             (is_letter(character) || is_mark(character) || is_lower(character) || is_upper(character))) {
    refuse("a letter beyond ASCII where case is ignored");
  }
}

RegexParser::Node RegexParser::options(bool& ignore_case) {
  bool on = true;
  for (; more() && peek() != ':' && peek() != ')'; ++at_) {
    if (peek() == '-') {
      on = false;
    } else if (peek() == 'i') {
      ignore_case = on;
    } else if (peek() == 'm') {
      dot_all_ = on;
    } else {
      refuse("the option (?" + to_utf8(std::u32string(1, peek())) + ")");
    }
  }
  return {};
}

RegexParser::Node RegexParser::group() {
  ++at_;
  before_ = 0;
  const bool outer = ignore_case_, outer_dot = dot_all_;
  Node result;
  if (take('?')) {
    result.kind = Node::kGroup;
    if (take(':')) {
      result.kind = Node::kJoin;
    } else if (take('=')) {
      result.assertion = Instruction::kAhead;
    } else if (take('!')) {
      result.assertion = Instruction::kNotAhead;
    } else if (take(U"<=")) {
      result.assertion = Instruction::kBehind;
    } else if (take(U"<!")) {
      result.assertion = Instruction::kNotBehind;
    } else if (take('>')) {
      result.assertion = Instruction::kAtomic;
    } else if (peek() == '<' || peek() == '#' || peek() == '(' || peek() == '~' || peek() == '@') {
      refuse("the group (?" + to_utf8(std::u32string(1, peek())));
    } else {
      result.kind = Node::kJoin;
      options(ignore_case_);
      if (take(')')) {  // for the rest of the group around it, alternatives included
        result.parts.push_back(choice());
        ignore_case_ = outer;
        dot_all_ = outer_dot;
        return result;
      }
      if (!take(':')) refuse("'(?' without an end");
    }
  } else {
    result.kind = Node::kJoin;  // what a group captured is not used
  }
  result.parts.push_back(choice());
  ignore_case_ = outer;
  dot_all_ = outer_dot;
  if (!take(')')) refuse("'(' without ')'");
  before_ = 0;
  return result;
}

bool RegexParser::bounds(std::uint32_t& low, std::uint32_t& high) {
  const std::size_t start = at_;
  const auto number = [&](std::uint32_t& value) {
    bool any = false;
    std::uint64_t sum = 0;
    for (; is_digit(peek()); ++at_, any = true)
      sum = std::min<std::uint64_t>(sum * 10 + (peek() - '0'), kUnbounded - 2);
    if (any) value = static_cast<std::uint32_t>(sum);
    return any;
  };
  low = 0;
  high = kUnbounded;
  const bool has_low = take('{') && number(low);
  if (take(',')) {
    if (!number(high) && !has_low) high = kUnbounded - 1;  // "{,}" is no quantifier
  } else {
    high = low;
  }
  if (!take('}') || (!has_low && high >= kUnbounded - 1) || (!has_low && high == low)) {
    at_ = start;  // a literal
    return false;
  }
  if (low > kMaxRepeats || (high != kUnbounded && high > kMaxRepeats)) refuse("a repetition of more than 1000 times");
  if (low > high) refuse("a repetition {low,high} with low above high");
  return true;
}

RegexParser::Node RegexParser::quantified(Node node) {
  while (more()) {
    std::uint32_t low = 0, high = kUnbounded;
    const bool braces = peek() == '{';
    if (braces) {
      if (!bounds(low, high)) return node;
    } else if (take('+')) {
      low = 1;
    } else if (take('?')) {
      high = 1;
    } else if (!take('*')) {
      return node;
    }
    before_ = 0;
    Node result;
    result.kind = Node::kRepeat;
    result.low = low;
    result.high = high;
    if (take('?')) {
      if (braces && low == high) refuse("the repetition {n}?");
      result.lazy = true;
    } else if (!braces && take('+')) {
      result.possessive = true;
    }
    if (node.kind == Node::kAssert || (node.kind == Node::kGroup && node.assertion != Instruction::kAtomic)) {
      refuse("a repeated condition");
    }
    result.parts.push_back(std::move(node));
    node = std::move(result);
  }
  return node;
}

char32_t RegexParser::hexadecimal(int digits) {
  char32_t value = 0;
  for (int i = 0; i < digits; ++i, ++at_) {
    const char32_t letter = peek();
    const bool hex = is_digit(letter) || ((letter | 32) >= 'a' && (letter | 32) <= 'f');
    if (!hex) refuse(concat("an escape of fewer than ", digits, " hexadecimal digits"));
    value = value * 16 + (is_digit(letter) ? letter - '0' : (letter | 32) - 'a' + 10);
  }
  return value;
}

// The character of an escape whose letter is next.
char32_t RegexParser::escaped_character() {
  const char32_t letter = peek();
  ++at_;
  switch (letter) {
    case 't': return '\t';
    case 'n': return '\n';
    case 'r': return '\r';
    case 'f': return '\f';
    case 'v': return '\v';
    case 'a': return '\a';
    case 'e': return 0x1b;
    case 'u':
    case 'x': {
      char32_t value = 0;
      if (letter == 'x' && take('{')) {
        const std::size_t end = pattern_.find(U'}', at_);
        if (end == std::u32string::npos || end - at_ == 0 || end - at_ > 6) refuse("the escape \\x{");
        value = hexadecimal(static_cast<int>(end - at_));
        ++at_;
      } else {
        value = hexadecimal(letter == 'u' ? 4 : 2);
        if (letter == 'x' && value >= 128) refuse("a byte as \\x80");
      }
      if (value > 0x10ffff || (value >= 0xd800 && value < 0xe000)) refuse("an escape that is no character");
      return value;
    }
    default: break;
  }
  if (is_ascii_letter(letter) || is_digit(letter)) refuse("the escape \\" + to_utf8(std::u32string(1, letter)));
  return letter;
}

RegexParser::Node RegexParser::escape() {
  ++at_;
  if (!more()) refuse("it ends with '\\'");
  const char32_t letter = peek();
  CharacterClass set;
  if (class_escape(letter, set)) {
    before_ = 0;
    return one_of(std::move(set));
  }
  Instruction::Kind kind = Instruction::kEnd;
  if (letter == 'A') kind = Instruction::kTextStart;
  if (letter == 'z') kind = Instruction::kTextEnd;
  if (letter == 'Z') kind = Instruction::kTextEndOrNewline;
  if (letter == 'b') kind = Instruction::kWordBoundary;
  if (letter == 'B') kind = Instruction::kNoWordBoundary;
  if (kind != Instruction::kEnd) {
    ++at_;
    return assertion(kind);
  }
  return literal(escaped_character());
}

// Add \s, \p{L} and so on, if `letter` begins one.
bool RegexParser::class_escape(char32_t letter, CharacterClass& set) {
  CharacterClass inner;
  switch (letter) {
    case 'd':
    case 'D': inner.categories = bit(Category::kDecimalNumber); break;
    case 's':
    case 'S': inner.space = true; break;
    case 'w':
    case 'W': inner.word = true; break;
    case 'p':
    case 'P':
      ++at_;
      property(letter == 'P', inner);
      set.members.push_back(std::move(inner));
      return true;
    default: return false;
  }
  ++at_;
  inner.negated = letter < 'a';
  set.members.push_back(std::move(inner));
  return true;
}

void RegexParser::property(bool negated, CharacterClass& set) {
  if (!take('{')) refuse("\\p without {");
  if (take('^')) negated = !negated;
  const std::size_t end = pattern_.find(U'}', at_);
  if (end == std::u32string::npos) refuse("\\p{ without }");
  const std::string name = to_utf8(std::u32string_view(pattern_).substr(at_, end - at_));
  const auto found = categories_of(name);
  if (!found) refuse("the property " + name);
  // Others have characters whose other case is not in them.
  if (ignore_case_ && name != "N" && name != "P" && name != "S") {
    refuse("the property " + name + " where case is ignored");
  }
  at_ = end + 1;
  set.categories = *found;
  set.negated = negated;
}

CharacterClass RegexParser::bracket() {
  if (++depth_ > kMaxDepth) refuse(concat("classes within classes, more than ", kMaxDepth));
  ++at_;
  CharacterClass result;
  result.negated = take('^');
  CharacterClass part;
  bool first = true;
  std::vector<CharacterClass> parts;
  while (true) {
    if (!more()) refuse("'[' without ']'");
    if (peek() == ']' && !first) break;
    first = false;
    if (take(U"&&")) {
      parts.push_back(std::move(part));
      part = {};
    } else {
      bracket_part(part);
    }
  }
  ++at_;
  if (parts.empty()) {
    part.negated = result.negated;
    result = std::move(part);
  } else {
    parts.push_back(std::move(part));
    result.members.push_back(std::move(parts[0]));
    result.others.assign(std::make_move_iterator(parts.begin() + 1), std::make_move_iterator(parts.end()));
  }
  --depth_;
  return result;
}

// One character, range, escape or class inside brackets.
void RegexParser::bracket_part(CharacterClass& set) {
  if (peek() == '[') {
    if (peek(1) == ':') refuse("a class such as [:alpha:]");
    set.members.push_back(bracket());
    return;
  }
  char32_t low = peek();
  ++at_;
  if (low == '\\') {
    if (!more()) refuse("it ends with '\\'");
    if (class_escape(peek(), set)) {
      if (peek() == '-' && peek(1) != ']') refuse("a range that begins with a class");
      return;
    }
    if (peek() == 'b') refuse("the escape [\\b]");
    low = escaped_character();
  }
  if (peek() != '-' || peek(1) == ']' || at_ + 1 >= pattern_.size()) return add_character(set, low);
  if (peek(1) == '[' || low == '-') refuse("an unclear '-' in a class");
  ++at_;
  char32_t high = peek();
  ++at_;
  if (high == '\\') {
    if (!more()) refuse("it ends with '\\'");
    high = escaped_character();
  }
  if (high < low) refuse("a range whose end is before its beginning");
  if (ignore_case_) {
    const auto all_letters = [&](char32_t from, char32_t to) { return low >= from && high <= to; };
    if (all_letters('a', 'z') || all_letters('A', 'Z')) {
      for (char32_t letter = low; letter <= high; ++letter) add_character(set, letter);
      return;
    }
    if (!all_letters('0', '9')) refuse("such a range where case is ignored");
  }
  set.ranges.emplace_back(low, high);
}

}  // namespace edgelm::capi
