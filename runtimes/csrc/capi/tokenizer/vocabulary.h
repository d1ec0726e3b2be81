// What a tokenizer file is to a Tokenizer, as edgelm/tokenization/vocabulary.py. Everything that the files next to it
// declare is in tokenizer.edgelm.json.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "capi/common/json.h"

namespace edgelm::capi {

using TokenId = std::int32_t;

// All members may be called from several threads at once.
class Vocabulary {
 public:
  virtual ~Vocabulary() = default;

  // Append the ids of `text`, which is valid UTF-8. Added tokens in it become those tokens. No bos is added.
  virtual void encode(std::string_view text, std::vector<TokenId>& ids) const = 0;
  // The bytes that a token adds to a text, maybe part of a character; empty for an unknown id.
  virtual std::string token_bytes(TokenId id) const = 0;
  // The same as in every version of EdgeLM, for fingerprints.
  virtual std::string fingerprint_bytes(TokenId id) const { return token_bytes(id); }
  // Whether the token is one raw byte.
  virtual bool is_byte(TokenId id) const = 0;
};

// Open `path`, a tokenizer.json or tokenizer.model, by the fields of tokenizer.edgelm.json that
// edgelm/tokenization/description.py lists. Both throw Error(EDGELM_TOKENIZER).
std::unique_ptr<Vocabulary> open_json_vocabulary(const std::string& path, const Members& settings);
std::unique_ptr<Vocabulary> open_piece_vocabulary(const std::string& path, const Members& settings);

}  // namespace edgelm::capi
