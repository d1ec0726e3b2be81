#include "capi/common/json_parser.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <locale>
#include <sstream>
#include <unordered_map>

#include "capi/common/unicode.h"

namespace edgelm::capi {

namespace {

constexpr int kMaxDepth = 200;

bool is_digit(char letter) { return letter >= '0' && letter <= '9'; }

// What a number becomes that no double can hold: its decimal exponent says whether it is too large or too small.
double beyond_range(std::string_view text) {
  const std::size_t e = std::min(text.find_first_of("eE"), text.size());
  const std::size_t first = text.find_first_of("123456789");
  double exponent = 0;
  if (e < text.size()) {
    for (const char letter : text.substr(e + 1)) {
      if (is_digit(letter)) exponent = exponent * 10 + (letter - '0');
    }
    if (text[e + 1] == '-') exponent = -exponent;
  }
  const double point = double(std::min(text.find('.'), e));
  const bool large = first < e && exponent + point - double(first) > 0;
  const double size = large ? std::numeric_limits<double>::infinity() : 0.0;
  return text[0] == '-' ? -size : size;
}

}  // namespace

double read_double(std::string_view text) {
// libc++ has it for double since 20 and does not say so, since it lacks it for long double.
#if (defined(__cpp_lib_to_chars) && __cpp_lib_to_chars >= 201611L) ||                                                  \
    (defined(_LIBCPP_VERSION) && _LIBCPP_VERSION >= 200000)
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  (void)end;
  return error == std::errc() ? value : beyond_range(text);
#else
  std::istringstream stream{std::string(text)};
  stream.imbue(std::locale::classic());
  double value = 0;
  stream >> value;
  return stream.fail() ? beyond_range(text) : value;
#endif
}

Json JsonParser::document() {
  at_ = valid_utf8_prefix(text_);
  if (at_ != text_.size()) refuse("not UTF-8");
  at_ = 0;
  skip_space();
  if (at_ == text_.size()) refuse("empty");
  Json result = value();
  skip_space();
  if (at_ != text_.size()) refuse("more follows the document");
  return result;
}

void JsonParser::refuse(const std::string& problem) const {
  const std::string_view before = text_.substr(0, at_);
  const auto line = std::count(before.begin(), before.end(), '\n') + 1;
  const std::size_t begin = before.rfind('\n') + 1;  // npos + 1 is 0
  const auto column = std::count_if(before.begin() + static_cast<std::ptrdiff_t>(begin), before.end(),
                                    [](char byte) { return (byte & 0xc0) != 0x80; }) +
                      1;
  fail(code_, where_, ": not valid JSON (", problem, ": line ", std::int64_t(line), " column ", std::int64_t(column),
       ")");
}

void JsonParser::skip_space() {
  while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) {
    ++at_;
  }
}

bool JsonParser::take(std::string_view word) {
  if (text_.substr(at_, word.size()) != word) return false;
  at_ += word.size();
  return true;
}

Json JsonParser::value() {
  switch (peek()) {
    case '{': return object();
    case '[': return array();
    case '"': return string();
    case 'n':
      if (take("null")) return {};
      break;
    case 't':
      if (take("true")) return true;
      break;
    case 'f':
      if (take("false")) return false;
      break;
    case 'N':
      if (take("NaN")) return std::numeric_limits<double>::quiet_NaN();
      break;
    case 'I':
      if (take("Infinity")) return std::numeric_limits<double>::infinity();
      break;
    case '-':
      if (take("-Infinity")) return -std::numeric_limits<double>::infinity();
      return number();
    default:
      if (is_digit(peek())) return number();
  }
  refuse("expected a value");
}

Json JsonParser::array() {
  if (++depth_ > kMaxDepth) refuse(concat("nested more than ", kMaxDepth, " deep"));
  Json::Array items;
  ++at_;
  skip_space();
  if (!take("]")) {
    do {
      skip_space();
      items.push_back(value());
      skip_space();
    } while (take(","));
    if (!take("]")) refuse("expected ',' or ']'");
  }
  --depth_;
  return items;
}

Json JsonParser::object() {
  if (++depth_ > kMaxDepth) refuse(concat("nested more than ", kMaxDepth, " deep"));
  Json::Object members;
  ++at_;
  skip_space();
  if (!take("}")) {
    do {
      skip_space();
      if (peek() != '"') refuse("expected a key in double quotes");
      std::string key = string();
      skip_space();
      if (!take(":")) refuse("expected ':'");
      skip_space();
      members.emplace_back(std::move(key), value());
      skip_space();
    } while (take(","));
    if (!take("}")) refuse("expected ',' or '}'");
  }
  --depth_;
  resolve_duplicates(members);
  return members;
}

// Of a key that occurs twice, keep the last value at the place of the first.
void JsonParser::resolve_duplicates(Json::Object& members) const {
  if (members.size() < 2) return;
  std::unordered_map<std::string_view, std::size_t> places;
  places.reserve(members.size());
  std::vector<bool> dropped;
  for (std::size_t i = 0; i < members.size(); ++i) {
    const auto [place, is_new] = places.emplace(members[i].first, i);
    if (is_new) continue;
    if (unique_) refuse(concat("the key ", quoted(members[i].first), " is there twice"));
    members[place->second].second = std::move(members[i].second);
    dropped.resize(members.size());
    dropped[i] = true;
  }
  if (dropped.empty()) return;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < members.size(); ++i) {
    if (dropped[i]) continue;
    if (kept != i) members[kept] = std::move(members[i]);
    ++kept;
  }
  members.resize(kept);
}

void JsonParser::digits() {
  if (!is_digit(peek())) refuse("expected a digit");
  while (is_digit(peek())) ++at_;
}

Json JsonParser::number() {
  const std::size_t begin = at_;
  bool whole = true;
  take("-");
  if (!take("0")) digits();
  if (take(".")) {
    whole = false;
    digits();
  }
  if (peek() == 'e' || peek() == 'E') {
    whole = false;
    ++at_;
    if (peek() == '+' || peek() == '-') ++at_;
    digits();
  }
  const std::string_view text = text_.substr(begin, at_ - begin);
  std::int64_t integer = 0;
  if (whole && std::from_chars(text.data(), text.data() + text.size(), integer).ec == std::errc()) return integer;
  return read_double(text);
}

std::string JsonParser::string() {
  ++at_;
  std::string result;
  for (;;) {
    const std::size_t begin = at_;
    while (at_ < text_.size() && text_[at_] != '"' && text_[at_] != '\\' &&
           static_cast<unsigned char>(text_[at_]) >= 0x20) {
      ++at_;
    }
    result.append(text_, begin, at_ - begin);
    if (at_ == text_.size()) refuse("a string that does not end");
    if (take("\"")) return result;
    if (text_[at_] != '\\') refuse("a control character in a string");
    ++at_;
    escape(result);
  }
}

void JsonParser::escape(std::string& result) {
  static const std::string_view names = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
  if (take("u")) {
    char32_t character = hex4();
    if (character >= 0xd800 && character < 0xdc00 && take("\\u")) {
      const char32_t low = hex4();
      if (low < 0xdc00 || low > 0xdfff) refuse("half of a surrogate pair");
      character = 0x10000 + ((character - 0xd800) << 10) + (low - 0xdc00);
    } else if (character >= 0xd800 && character <= 0xdfff) {
      refuse("half of a surrogate pair");
    }
    append_utf8(result, character);
    return;
  }
  const std::size_t place = at_ < text_.size() ? names.find(text_[at_]) : names.npos;
  if (place == names.npos) refuse("an escape that JSON does not have");
  ++at_;
  result += meanings[place];
}

unsigned JsonParser::hex4() {
  unsigned value = 0;
  const std::string_view text = text_.substr(at_, 4);
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  if (text.size() < 4 || error != std::errc() || end != text.data() + 4) refuse("expected four hexadecimal digits");
  at_ += 4;
  return value;
}

}  // namespace edgelm::capi
