#include "capi/chat/syntax/lexer.h"

#include <algorithm>
#include <cstdio>

#include "capi/chat/values/failure.h"
#include "capi/chat/values/text.h"
#include "capi/common/unicode.h"

namespace edgelm::capi::chat {

std::string at_line(int line) { return concat("line ", line, ": "); }

namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter_ascii(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

// Line ends as "\n", and without the last one.
std::string normalized_lines(std::string_view source) {
  std::string text;
  text.reserve(source.size());
  for (std::size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      text += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      text += source[i];
    }
  }
  if (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(normalized_lines(source)) {}

  std::vector<Token> run() {
    while (at_ < source_.size()) root();
    add(Token::kEnd, "");
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void invalid(const std::string& message) const {
    throw Failure(Failure::kInvalid, at_line(line_) + message);
  }

  bool has(std::string_view text, std::size_t at) const { return source_.compare(at, text.size(), text) == 0; }
  bool has(std::string_view text) const { return has(text, at_); }
  char letter(std::size_t ahead = 0) const { return at_ + ahead < source_.size() ? source_[at_ + ahead] : '\0'; }

  void add(Token::Kind kind, std::string text) { tokens_.push_back({kind, line_, std::move(text)}); }

  // Go to a place; count its lines.
  void advance(std::size_t to) {
    for (; at_ < to; ++at_) line_ += source_[at_] == '\n';
  }

  std::size_t spaces_end(std::size_t from) const {
    while (from < source_.size()) {
      std::size_t after = from;
      if (!is_python_space(next_character(source_, after))) break;
      from = after;
    }
    return from;
  }

  // Where a tag that begins at `at` with "{%", an optional sign and `word` ends, if it is one; otherwise 0. `inner`: the
  // place after the word.
  bool is_tag_of(std::string_view word, std::size_t at, std::size_t& inner) const {
    if (!has("{%", at)) return false;
    at += 2;
    if (at < source_.size() && (source_[at] == '-' || source_[at] == '+')) ++at;
    at = spaces_end(at);
    if (!has(word, at)) return false;
    inner = spaces_end(at + word.size());
    return true;
  }

  // The end of the closing "%}", "-%}" or "+%}" at `at`; 0 if there is none. After "-%}" all space belongs to it, and
  // after the others one line end if `trims`.
  std::size_t closing(std::string_view end, std::size_t at, bool trims) const {
    if (has("-", at) && has(end, at + 1)) return spaces_end(at + 1 + end.size());
    if (trims && has("+", at) && has(end, at + 1)) return at + 1 + end.size();
    if (!has(end, at)) return 0;
    at += end.size();
    return trims && at < source_.size() && source_[at] == '\n' ? at + 1 : at;
  }

  // The data up to a tag at `tag`, with its end stripped as the tag's sign says.
  void data(std::size_t tag, bool variable) {
    std::string_view text = std::string_view(source_).substr(at_, tag - at_);
    const char sign = tag + 2 < source_.size() ? source_[tag + 2] : '\0';
    if (sign == '-') {
      text = stripped(text, false, true);
    } else if (sign != '+' && !variable) {
      const std::size_t line = text.rfind('\n') == text.npos ? 0 : text.rfind('\n') + 1;
      if ((line > 0 || line_starting_) && stripped(text.substr(line)).empty()) text = text.substr(0, line);
    }
    if (!text.empty()) add(Token::kData, std::string(text));
    advance(tag);
  }

  void root() {
    std::size_t tag = at_;
    for (;; ++tag) {
      tag = source_.find('{', tag);
      if (tag == std::string::npos || tag + 1 >= source_.size()) {
        add(Token::kData, source_.substr(at_));
        advance(source_.size());
        return;
      }
      const char kind = source_[tag + 1];
      if (kind == '{' || kind == '%' || kind == '#') break;
    }
    data(tag, source_[tag + 1] == '{');
    std::size_t inner = 0;
    if (is_tag_of("raw", tag, inner) && raw(inner)) return;
    line_starting_ = false;
    const char kind = source_[tag + 1];
    const std::size_t begin = tag + 2 + (letter(2) == '-' || letter(2) == '+');
    if (kind == '#') return comment(begin);
    add(kind == '%' ? Token::kBlockBegin : Token::kVariableBegin, "");
    advance(begin);
    inside(kind == '%');
  }

  // A raw block, whose tag's word ends before `inner`. False if the tag is another one.
  bool raw(std::size_t inner) {
    std::size_t begin = closing("%}", inner, false);
    if (begin == 0) return false;
    advance(begin);
    line_starting_ = begin > 0 && source_[begin - 1] == '\n';
    for (std::size_t tag = at_; (tag = source_.find("{%", tag)) != std::string::npos; ++tag) {
      std::size_t end = 0;
      if (!is_tag_of("endraw", tag, end) || (end = closing("%}", end, true)) == 0) continue;
      data(tag, false);
      advance(end);
      line_starting_ = source_[end - 1] == '\n';
      return true;
    }
    if (at_ < source_.size()) invalid("Missing end of raw directive");
    return true;
  }

  void comment(std::size_t begin) {
    for (std::size_t end = begin; (end = source_.find('#', end)) != std::string::npos; ++end) {
      if (!has("#}", end)) continue;
      if (end > begin && (source_[end - 1] == '-' || source_[end - 1] == '+')) --end;
      advance(closing("#}", end, true));
      line_starting_ = source_[at_ - 1] == '\n';
      return;
    }
    advance(begin);
    if (at_ < source_.size()) invalid("Missing end of comment tag");
  }

  void inside(bool block) {
    std::string open;  // brackets
    while (at_ < source_.size()) {
      if (open.empty()) {
        const std::size_t end = closing(block ? "%}" : "}}", at_, block);
        if (end != 0) {
          add(block ? Token::kBlockEnd : Token::kVariableEnd, "");
          advance(end);
          line_starting_ = source_[end - 1] == '\n';
          return;
        }
      }
      const std::size_t spaces = spaces_end(at_);
      if (spaces > at_) advance(spaces);
      else if (is_digit(letter())) number();
      else if (is_letter_ascii(letter())) name();
      else if (letter() == '\'' || letter() == '"') string();
      else sign(open);
    }
  }

  std::size_t digits_end(std::size_t from, bool (*digit)(char)) const {
    while (from < source_.size()) {
      if (digit(source_[from])) ++from;
      else if (source_[from] == '_' && from + 1 < source_.size() && digit(source_[from + 1])) from += 2;
      else break;
    }
    return from;
  }

  void number() {
    const std::size_t whole = digits_end(at_, is_digit);
    std::size_t end = whole;
    bool real = false;
    const bool after_point = at_ > 0 && source_[at_ - 1] == '.';
    if (!after_point && end + 1 < source_.size() && source_[end] == '.' && is_digit(source_[end + 1])) {
      end = digits_end(end + 1, is_digit);
      real = true;
    }
    if (!after_point && end < source_.size() && (source_[end] | 0x20) == 'e') {
      std::size_t exponent = end + 1;
      if (exponent < source_.size() && (source_[exponent] == '+' || source_[exponent] == '-')) ++exponent;
      if (exponent < source_.size() && is_digit(source_[exponent])) {
        end = digits_end(exponent, is_digit);
        real = true;
      }
    }
    if (!real) end = integer_end(whole);
    std::string text = source_.substr(at_, end - at_);
    text.erase(std::remove(text.begin(), text.end(), '_'), text.end());
    add(real ? Token::kFloat : Token::kInteger, text);
    advance(end);
  }

  std::size_t integer_end(std::size_t decimal) const {
    if (source_[at_] != '0') return decimal;
    const char kind = static_cast<char>(letter(1) | 0x20);
    bool (*digit)(char) = nullptr;
    if (kind == 'x') digit = [](char c) { return is_digit(c) || ((c | 0x20) >= 'a' && (c | 0x20) <= 'f'); };
    if (kind == 'o') digit = [](char c) { return c >= '0' && c <= '7'; };
    if (kind == 'b') digit = [](char c) { return c == '0' || c == '1'; };
    if (digit != nullptr) {
      const std::size_t from = at_ + 2 + (letter(2) == '_');
      if (from < source_.size() && digit(source_[from])) return digits_end(from, digit);
    }
    return digits_end(at_, [](char c) { return c == '0'; });
  }

  void name() {
    std::size_t end = at_;
    while (end < source_.size() && (is_letter_ascii(source_[end]) || is_digit(source_[end]))) ++end;
    if (end < source_.size() && static_cast<unsigned char>(source_[end]) > 0x7F) other_letters();
    add(Token::kName, source_.substr(at_, end - at_));
    advance(end);
  }

  [[noreturn]] void other_letters() const { unsupported(at_line(line_), "a name with letters beyond ASCII"); }

  void sign(std::string& open) {
    static const char* const pairs[] = {"**", "//", "==", "!=", ">=", "<="};
    std::string text(1, letter());
    for (const char* pair : pairs) {
      if (has(pair)) text = pair;
    }
    if (text.size() == 1 && std::string_view("+-*/%~[](){}><=.:|,;").find(text) == std::string_view::npos) {
      if (static_cast<unsigned char>(text[0]) > 0x7F) other_letters();
      invalid(concat("unexpected char ", repr_of_text(text)));
    }
    const char first = text[0];
    if (first == '{' || first == '(' || first == '[') {
      open += first == '{' ? '}' : first == '(' ? ')' : ']';
    } else if (first == '}' || first == ')' || first == ']') {
      if (open.empty()) invalid(concat("unexpected '", text, "'"));
      if (open.back() != first)
        invalid(concat("unexpected '", text, "', expected '", open.substr(open.size() - 1), "'"));
      open.pop_back();
    }
    add(Token::kOperator, text);
    advance(at_ + text.size());
  }

  void string() {
    const char quote = letter();
    std::size_t end = at_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) invalid(concat("unexpected char ", repr_of_text({&quote, 1})));
    add(Token::kString, unescaped(std::string_view(source_).substr(at_ + 1, end - at_ - 1)));
    advance(end + 1);
  }

  std::string unescaped(std::string_view text) const {
    std::string result;
    for (std::size_t i = 0; i < text.size(); ++i) {
      if (text[i] != '\\') {
        result += text[i];
        continue;
      }
      if (++i == text.size()) invalid("\\ at end of string");
      static const std::string_view names = "\n\\'\"abfnrtv";
      static const char values[] = "\0\\'\"\a\b\f\n\r\t\v";
      const std::size_t place = names.find(text[i]);
      if (place != names.npos) {
        if (place > 0) result += values[place];
      } else if (static_cast<unsigned char>(text[i]) > 0x7F) {
        beyond_ascii(text, i, result);
      } else {
        code(text, i, result);
      }
    }
    return result;
  }

  // A backslash before a character beyond ASCII: Python first writes that character as an escape.
  static void beyond_ascii(std::string_view text, std::size_t& i, std::string& result) {
    const auto character = static_cast<unsigned>(next_character(text, i));
    --i;
    char escape[16];
    const char* form = character < 0x100 ? "\\x%02x" : character < 0x10000 ? "\\u%04x" : "\\U%08x";
    std::snprintf(escape, sizeof escape, form, character);
    result += escape;
  }

  void code(std::string_view text, std::size_t& i, std::string& result) const {
    const char kind = text[i];
    std::size_t digits = kind == 'x' ? 2 : kind == 'u' ? 4 : kind == 'U' ? 8 : 0;
    unsigned base = 16;
    if (kind >= '0' && kind <= '7') {
      base = 8;
      for (digits = 1; digits < 3 && i + digits < text.size() && text[i + digits] >= '0' && text[i + digits] <= '7';) {
        ++digits;
      }
      --i;
    } else if (kind == 'N') {
      unsupported(at_line(line_), "the escape \\N in a string");
    } else if (digits == 0) {
      result += '\\';
      result += kind;
      return;
    }
    std::uint32_t value = 0;
    for (std::size_t n = 0; n < digits; ++n) {
      const char c = ++i < text.size() ? text[i] : '\0';
      const int digit = is_digit(c) ? c - '0' : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10 : -1;
      if (digit < 0) invalid(concat("truncated \\", std::string_view(&kind, 1), " escape in a string"));
      value = value * base + static_cast<unsigned>(digit);
    }
    if (value > 0x10FFFF) invalid("illegal Unicode character in a string");
    if (value >= 0xD800 && value < 0xE000) unsupported(at_line(line_), "a lone surrogate in a string");
    append_utf8(result, value);
  }

  const std::string source_;
  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
};

}  // namespace

std::vector<Token> tokens_of(std::string_view source) { return Lexer(source).run(); }

}  // namespace edgelm::capi::chat
