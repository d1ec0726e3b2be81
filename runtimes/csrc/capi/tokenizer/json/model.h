// The model of a tokenizer.json: it makes ids of words.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "capi/common/json.h"
#include "capi/tokenizer/json/token_table.h"

namespace edgelm::capi {

class WordModel {
 public:
  virtual ~WordModel() = default;
  // Append the ids of a word. Throws Error(EDGELM_TOKENIZER) if the vocabulary cannot encode it.
  virtual void encode(std::string_view word, std::vector<TokenId>& ids) const = 0;
};

// "model" of tokenizer.edgelm.json: "BPE" or "Unigram". `file` must outlive the result.
std::unique_ptr<WordModel> open_word_model(const Members& settings, const TokenizerFile& file, const std::string& path);
std::unique_ptr<WordModel> open_bpe(const Members& settings, const TokenizerFile& file, const std::string& path);
std::unique_ptr<WordModel> open_unigram(const Members& settings, const TokenizerFile& file, const std::string& path);

// "<0x0A>" for 10.
std::string byte_token(unsigned char byte);

}  // namespace edgelm::capi
