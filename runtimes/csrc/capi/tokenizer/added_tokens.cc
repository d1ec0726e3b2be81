#include "capi/tokenizer/added_tokens.h"

#include <algorithm>

#include "capi/common/unicode.h"

namespace edgelm::capi {

namespace {

// Longer ones are in no published file, and a text may begin like one at each of its characters.
constexpr std::size_t kMaxBytes = 10000;

std::vector<AddedToken> read(const Members& settings) {
  std::vector<AddedToken> tokens;
  for (const Json& item : settings.array("added_tokens")) {
    const Members fields(item, settings.where() + ": added_tokens", EDGELM_TOKENIZER);
    AddedToken token;
    token.content = fields.string("content");
    token.id = static_cast<TokenId>(fields.integer("id", 0, INT32_MAX));
    token.lstrip = fields.boolean("lstrip", false);
    token.rstrip = fields.boolean("rstrip", false);
    token.single_word = fields.boolean("single_word", false);
    token.normalized = fields.boolean("normalized", false);
    token.special = fields.boolean("special", false);
    if (token.content.size() > kMaxBytes) {
      fail(EDGELM_TOKENIZER, settings.where(), ": an added token has ", token.content.size(),
           " bytes, more than the limit of ", kMaxBytes);
    }
    tokens.push_back(std::move(token));
  }
  return tokens;
}

// Where the character before `at` begins.
std::size_t previous(std::string_view text, std::size_t at) {
  --at;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
  return at;
}

bool ends_with_word(std::string_view text, std::size_t end) {
  if (end == 0) return false;
  std::size_t at = previous(text, end);
  return is_word(next_character(text, at));
}

bool starts_with_word(std::string_view text, std::size_t at) {
  return at < text.size() && is_word(next_character(text, at));
}

// The beginning of the white space that ends at `end`.
std::size_t without_space_before(std::string_view text, std::size_t end) {
  while (end > 0) {
    const std::size_t begin = previous(text, end);
    std::size_t at = begin;
    if (!is_white_space(next_character(text, at))) break;
    end = begin;
  }
  return end;
}

std::size_t without_space_after(std::string_view text, std::size_t at) {
  while (at < text.size()) {
    std::size_t next = at;
    if (!is_white_space(next_character(text, next))) break;
    at = next;
  }
  return at;
}

}  // namespace

AddedTokens::AddedTokens(std::vector<AddedToken> tokens, bool split_special, Normalizer normalize)
    : tokens_(std::move(tokens)), split_special_(split_special), normalize_(std::move(normalize)) {
  for (const bool special : {true, false}) {  // the library's order
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
      const AddedToken& token = tokens_[i];
      if (token.special != special) continue;
      const std::uint32_t value = static_cast<std::uint32_t>(i);
      if (!token.normalized) {
        if (!token.content.empty()) raw_.add(token.content, value);
        continue;
      }
      texts_.push_back(normalize_ ? normalize_(token.content) : token.content);
      if (!texts_.back().empty()) normalized_.add(texts_.back(), value);
    }
  }
  raw_.build();
  normalized_.build();
}

AddedTokens::AddedTokens(const Members& settings, Normalizer normalize)
    : AddedTokens(read(settings), settings.boolean("split_special_tokens", false), std::move(normalize)) {}

std::vector<AddedTokens::Match> AddedTokens::find(const PrefixIndex& patterns, std::string_view text) const {
  std::vector<Match> matches;
  std::size_t end_of_last = 0;
  for (std::size_t at = 0; at < text.size();) {
    std::uint32_t index = 0;
    const std::size_t size = patterns.longest(text, at, index);
    if (size == 0) {
      ++at;
      continue;
    }
    std::size_t start = at, end = at + size;
    at = end;
    const AddedToken& token = tokens_[index];
    if (split_special_ && token.special) continue;
    if (token.single_word && (ends_with_word(text, start) || starts_with_word(text, end))) continue;
    // What the previous token has matched already is not matched again.
    if (token.lstrip) start = std::max(without_space_before(text, start), end_of_last);
    if (token.rstrip) end = without_space_after(text, end);
    matches.push_back({index, start, end});
    end_of_last = end;
  }
  return matches;
}

std::vector<TextPart> AddedTokens::split(std::string_view text) const {
  std::vector<TextPart> parts;
  const auto add_text = [&](std::string_view raw, bool at_start) {
    const std::string normal = normalize_ ? normalize_(raw) : std::string(raw);
    std::size_t done = 0;
    const auto add = [&](std::size_t end) {
      if (done < end) parts.push_back({{}, normal.substr(done, end - done), at_start && done == 0});
    };
    for (const Match& match : find(normalized_, normal)) {
      add(match.start);
      parts.push_back({tokens_[match.token].id, {}, false});
      done = match.end;
    }
    add(normal.size());
  };
  std::size_t done = 0;
  for (const Match& match : find(raw_, text)) {
    if (done < match.start) add_text(text.substr(done, match.start - done), done == 0);
    parts.push_back({tokens_[match.token].id, {}, false});
    done = match.end;
  }
  if (done < text.size()) add_text(text.substr(done), done == 0);
  return parts;
}

}  // namespace edgelm::capi
