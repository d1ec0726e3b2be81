// Read the model of a tokenizer.json in one pass over its text.
#include <cmath>

#include "capi/common/error.h"
#include "capi/common/files.h"
#include "capi/common/json_parser.h"
#include "capi/common/unicode.h"
#include "capi/tokenizer/json/token_table.h"

namespace edgelm::capi {

namespace {

constexpr std::uint64_t kMaxBytes = std::uint64_t{64} << 20;  // as in edgelm/tokenization/tokenizer_json.py
constexpr int kMaxDepth = 200;

class FileReader {
 public:
  explicit FileReader(const std::string& path) : path_(path), text_(read_file(path, kMaxBytes, EDGELM_TOKENIZER)) {}

  TokenizerFile read() {
    at_ = valid_utf8_prefix(text_);
    if (at_ != text_.size()) refuse("it is not UTF-8");
    at_ = 0;
    bool has_model = false;
    members([&](const std::string& key) {
      if (key != "model") return skip(0);
      if (has_model) refuse("it has two models");
      has_model = true;
      model();
    });
    space();
    if (at_ != text_.size()) refuse("more follows its end");
    if (!has_model) refuse("it has no model");
    return std::move(result_);
  }

 private:
  [[noreturn]] void refuse(const std::string& problem) const {
    fail(EDGELM_TOKENIZER, path_, ": not a usable tokenizer.json (", problem, ", at byte ", at_,
         "); copy or export the bundle again");
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) {
      ++at_;
    }
  }
  bool take(char letter) {
    space();
    if (peek() != letter) return false;
    ++at_;
    return true;
  }
  void expect(char letter) {
    if (!take(letter)) refuse(std::string("expected '") + letter + "'");
  }

  // Call `member(key)` for each member of an object, which reads the value.
  template <class Member>
  void members(const Member& member) {
    expect('{');
    if (take('}')) return;
    std::string key;
    do {
      string(key);
      expect(':');
      space();
      member(key);
    } while (take(','));
    expect('}');
  }
  template <class Item>
  void items(const Item& item) {
    expect('[');
    if (take(']')) return;
    do {
      space();
      item();
    } while (take(','));
    expect(']');
  }

  void string(std::string& result);
  void escape(std::string& result);
  std::uint32_t hex4();
  void skip(int depth);
  std::string_view number();
  void model();
  void vocabulary();
  void merges();

  const std::string path_;
  const std::string text_;
  std::size_t at_ = 0;
  TokenizerFile result_;
};

void FileReader::string(std::string& result) {
  expect('"');
  result.clear();
  while (true) {
    const std::size_t start = at_;
    while (at_ < text_.size() && text_[at_] != '"' && text_[at_] != '\\' &&
           static_cast<unsigned char>(text_[at_]) >= 32) {
      ++at_;
    }
    result.append(text_, start, at_ - start);
    if (at_ >= text_.size()) refuse("a string has no end");
    if (text_[at_] == '"') {
      ++at_;
      return;
    }
    if (text_[at_] != '\\') refuse("a control character in a string");
    ++at_;
    escape(result);
  }
}

std::uint32_t FileReader::hex4() {
  std::uint32_t value = 0;
  for (int i = 0; i < 4; ++i, ++at_) {
    const char letter = peek(), small = static_cast<char>(letter | 32);
    const bool digit = letter >= '0' && letter <= '9';
    if (!digit && !(small >= 'a' && small <= 'f')) refuse("an escape that is no character");
    value = value * 16 + static_cast<std::uint32_t>(digit ? letter - '0' : small - 'a' + 10);
  }
  return value;
}

void FileReader::escape(std::string& result) {
  const char letter = peek();
  ++at_;
  switch (letter) {
    case 'n': result += '\n'; return;
    case 't': result += '\t'; return;
    case 'r': result += '\r'; return;
    case 'b': result += '\b'; return;
    case 'f': result += '\f'; return;
    case '"':
    case '\\':
    case '/': result += letter; return;
    case 'u': break;
    default: refuse("an unknown escape in a string");
  }
  char32_t character = hex4();
  if (character >= 0xd800 && character < 0xdc00 && peek() == '\\') {
    ++at_;
    if (peek() != 'u') refuse("an escape that is no character");
    ++at_;
    const std::uint32_t low = hex4();
    if (low < 0xdc00 || low >= 0xe000) refuse("an escape that is no character");
    character = 0x10000 + ((character - 0xd800) << 10) + (low - 0xdc00);
  }
  if (character >= 0xd800 && character < 0xe000) refuse("an escape that is no character");
  append_utf8(result, character);
}

std::string_view FileReader::number() {
  const std::size_t start = at_;
  while (at_ < text_.size() && (std::string_view("+-.eE").find(text_[at_]) != std::string_view::npos ||
                                (text_[at_] >= '0' && text_[at_] <= '9'))) {
    ++at_;
  }
  const std::string_view found = std::string_view(text_).substr(start, at_ - start);
  if (found.empty() || found.find_first_of("0123456789") == std::string_view::npos) refuse("expected a number");
  return found;
}

void FileReader::skip(int depth) {
  if (depth > kMaxDepth) refuse("values within values without end");
  std::string scratch;
  switch (peek()) {
    case '{': return members([&](const std::string&) { skip(depth + 1); });
    case '[': return items([&] { skip(depth + 1); });
    case '"': return string(scratch);
    default: break;
  }
  for (const std::string_view word : {"null", "true", "false", "NaN", "Infinity", "-Infinity"}) {
    if (std::string_view(text_).substr(at_, word.size()) == word) {
      at_ += word.size();
      return;
    }
  }
  number();
}

void FileReader::model() {
  std::size_t merges_at = 0;  // of merges that are before the vocabulary
  bool has_vocabulary = false, has_merges = false;
  members([&](const std::string& key) {
    if (key == "vocab") {
      if (has_vocabulary) refuse("it has two vocabularies");
      has_vocabulary = true;
      vocabulary();
    } else if (key == "merges" && peek() == '[') {
      if (has_merges) refuse("it has two lists of merges");
      has_merges = true;
      if (has_vocabulary) return merges();
      merges_at = at_;
      skip(0);
    } else {
      skip(0);
    }
  });
  if (!has_vocabulary) refuse("its model has no vocabulary");
  if (merges_at == 0) return;
  const std::size_t end = at_;
  at_ = merges_at;
  merges();
  at_ = end;
}

void FileReader::vocabulary() {
  TokenTable& tokens = result_.tokens;
  if (peek() == '{') {
    members([&](const std::string& token) {
      std::int64_t id = 0;
      const std::size_t start = at_;
      for (; peek() >= '0' && peek() <= '9'; ++at_) id = std::min(id * 10 + (peek() - '0'), TokenTable::kMaxIds);
      if (at_ == start || id >= TokenTable::kMaxIds || peek() == '.' || (peek() | 32) == 'e') {
        refuse(concat("the id of ", quoted(token), " is not between 0 and ", TokenTable::kMaxIds - 1));
      }
      tokens.add(token, static_cast<TokenId>(id));
    });
    return;
  }
  std::string token;
  items([&] {
    if (result_.scores.size() >= static_cast<std::size_t>(TokenTable::kMaxIds)) refuse("its vocabulary is too large");
    expect('[');
    string(token);
    expect(',');
    space();
    const double score = read_double(number());
    expect(']');
    if (!std::isfinite(score)) refuse("a score of its vocabulary is not finite");
    tokens.add(token, static_cast<TokenId>(result_.scores.size()));
    result_.scores.push_back(score);
  });
}

void FileReader::merges() {
  result_.has_merges = true;
  result_.merges.reserve(result_.tokens.size());
  std::uint32_t rank = 0;
  std::string left, right;
  const auto bad = [&] { refuse("a merge does not make one token of two"); };
  items([&] {
    if (peek() == '[') {
      ++at_;
      string(left);
      expect(',');
      string(right);
      expect(']');
    } else {
      string(left);
      const std::size_t cut = left.find(' ');
      if (cut == std::string::npos || left.find(' ', cut + 1) != std::string::npos) bad();
      right.assign(left, cut + 1);
      left.resize(cut);
    }
    const TokenId first = result_.tokens.find(left), second = result_.tokens.find(right);
    const TokenId both = result_.tokens.find(left += right);
    if (first < 0 || second < 0 || both < 0) bad();
    result_.merges.add(first, second, {rank++, both});
  });
}

}  // namespace

TokenizerFile read_tokenizer_file(const std::string& path) { return FileReader(path).read(); }

}  // namespace edgelm::capi
