// Split added tokens off a text, by the rules of the `tokenizers` library. Both kinds of vocabularies use this.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "capi/common/json.h"
#include "capi/tokenizer/prefix_index.h"
#include "capi/tokenizer/vocabulary.h"

namespace edgelm::capi {

// As AddedToken in edgelm/tokenization/added_tokens.py; an object of "added_tokens" in tokenizer.edgelm.json.
struct AddedToken {
  std::string content;
  TokenId id = 0;
  bool lstrip = false, rstrip = false, single_word = false, normalized = false, special = false;
};

// A part of a text: an added token, or the text between two.
struct TextPart {
  std::optional<TokenId> id;
  std::string text;       // normalised; empty for a token
  bool at_start = false;  // nothing is before it
};

class AddedTokens {
 public:
  using Normalizer = std::function<std::string(std::string_view)>;

  // `tokens` in the library's order: of two that match the same text, the first is used. With `split_special`, special
  // tokens are found but treated as text. `normalize` may be empty.
  AddedTokens(std::vector<AddedToken> tokens, bool split_special, Normalizer normalize);
  // "added_tokens" and "split_special_tokens" of tokenizer.edgelm.json.
  AddedTokens(const Members& settings, Normalizer normalize);

  // Parts without text are left out.
  std::vector<TextPart> split(std::string_view text) const;
  AddedTokens(const AddedTokens&) = delete;
  AddedTokens& operator=(const AddedTokens&) = delete;
  const std::vector<AddedToken>& tokens() const { return tokens_; }

 private:
  struct Match { std::size_t token, start, end; };

  std::vector<Match> find(const PrefixIndex& patterns, std::string_view text) const;

  std::vector<AddedToken> tokens_;
  bool split_special_;
  Normalizer normalize_;
  std::deque<std::string> texts_;  // of `normalized_`
  PrefixIndex raw_, normalized_;
};

}  // namespace edgelm::capi
