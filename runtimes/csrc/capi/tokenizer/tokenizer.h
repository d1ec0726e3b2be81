// Encode text to token ids and decode them, by the bundle's tokenizer.edgelm.json (docs/reference/bundle.md), which
// export writes: the tokenizer's files with all contradictions resolved.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "capi/bundle/bundle.h"
#include "capi/common/unicode.h"
#include "capi/tokenizer/vocabulary.h"

namespace edgelm::capi {

class Tokenizer;

// How decoding treats the space that encoding prepends to a text, as LeadingSpace in Python.
enum class LeadingSpace { kKeep, kDropOne, kDropOnePiece, kDropEachPiece };

// Converts ids to text one by one, and never returns part of a character. The texts, with `flush` at the end, join to
// `Tokenizer::decode` of all the ids. Must not outlive its tokenizer.
class Detokenizer {
 public:
  explicit Detokenizer(const Tokenizer& tokenizer, bool skip_special = true);
  std::string push(TokenId id);
  std::string flush();

 private:
  std::string without_leading_space(TokenId id, std::string bytes);

  const Tokenizer& tokenizer_;
  bool skip_special_, at_start_;
  Utf8Stream stream_;
};

// The tokenizer of a bundle. All members may be called from several threads at once.
class Tokenizer {
 public:
  // Throws Error(EDGELM_TOKENIZER), or EDGELM_BUNDLE for a bundle without the file: export it again.
  static std::unique_ptr<Tokenizer> open(const Bundle& bundle);
  // The same for any folder with a tokenizer.edgelm.json and the file that it names.
  static std::unique_ptr<Tokenizer> open(const std::string& folder);

  // Throws Error(EDGELM_TOKENIZER) if the text is not UTF-8, or bos is asked for and there is none.
  std::vector<TokenId> encode(std::string_view text, std::optional<bool> add_bos = {}) const;
  std::string decode(const std::vector<TokenId>& ids, bool skip_special = true) const;

  std::int64_t size() const { return size_; }  // one more than the largest id
  std::optional<TokenId> bos_id() const { return bos_id_; }
  std::optional<TokenId> pad_id() const { return pad_id_; }
  const std::vector<TokenId>& eos_ids() const { return eos_ids_; }
  bool add_bos() const { return add_bos_; }
  bool is_special(TokenId id) const;  // not text, and left out on decoding
  LeadingSpace leading_space() const { return leading_space_; }
  const Vocabulary& vocabulary() const { return *vocabulary_; }
  // tokenizer.edgelm.json; "chat_template" and "special_tokens" are in it.
  const Json& settings() const { return settings_; }
  // SHA-256 over the vocabulary and more, equal to Python's Tokenizer.fingerprint.
  std::string fingerprint() const;

 private:
  Tokenizer(Json settings, const std::string& folder);

  Json settings_;
  std::unique_ptr<Vocabulary> vocabulary_;
  std::int64_t size_ = 0;
  std::optional<TokenId> bos_id_, pad_id_;
  std::vector<TokenId> eos_ids_, special_;  // `special_` is sorted
  bool add_bos_ = false;
  LeadingSpace leading_space_ = LeadingSpace::kKeep;
};

}  // namespace edgelm::capi
