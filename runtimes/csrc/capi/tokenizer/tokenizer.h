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

namespace edgelm::capi {

using TokenId = std::int32_t;

class Tokenizer;

// Converts ids to text one by one, and never returns part of a character. The texts, with `flush` at the end, join to
// `Tokenizer::decode` of all the ids. Must not outlive its tokenizer.
class Detokenizer {
 public:
  explicit Detokenizer(const Tokenizer& tokenizer, bool skip_special = true);
  std::string push(TokenId id);
  std::string flush();

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_, at_start_;
  Utf8Stream stream_;
};

// The tokenizer of a bundle. All members may be called from several threads at once.
class Tokenizer {
 public:
  // Throws Error(EDGELM_TOKENIZER), or EDGELM_BUNDLE for a bundle without the file: export it again.
  static std::unique_ptr<Tokenizer> open(const Bundle& bundle);
  virtual ~Tokenizer() = default;

  // Throws Error(EDGELM_TOKENIZER) if the text is not UTF-8, or bos is asked for and there is none.
  std::vector<TokenId> encode(std::string_view text, std::optional<bool> add_bos = {}) const;
  std::string decode(const std::vector<TokenId>& ids, bool skip_special = true) const;

  std::int64_t size() const;  // one more than the largest id
  std::optional<TokenId> bos_id() const;
  std::optional<TokenId> pad_id() const;
  const std::vector<TokenId>& eos_ids() const;
  bool add_bos() const;
  // SHA-256 over the vocabulary and more, equal to Python's Tokenizer.fingerprint.
  std::string fingerprint() const;
};

}  // namespace edgelm::capi
