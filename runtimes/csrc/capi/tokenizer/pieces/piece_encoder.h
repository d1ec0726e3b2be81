// Encode text to the pieces of a tokenizer.model, with the results of SentencePiece's library.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "capi/tokenizer/charsmap.h"
#include "capi/tokenizer/pieces/piece_model.h"
#include "capi/tokenizer/prefix_index.h"

namespace edgelm::capi {

// A part of the normalised text, and its piece: the unknown one where there is none.
struct PieceMatch {
  std::string_view text;
  std::uint32_t id;
};

// Changes a text before it is encoded: rules for characters, spaces, and U+2581 for spaces.
class PieceNormalizer {
 public:
  // `user_defined` are kept as they are. Both outlive this.
  PieceNormalizer(const PieceModel& model, const PrefixIndex& user_defined, const std::string& path);
  std::string operator()(std::string_view text) const;

 private:
  // What replaces the text at `at`; `size` is how much of it.
  std::string_view next(std::string_view text, std::size_t at, std::size_t& size) const;

  const std::string path_;
  const PieceModel& model_;
  const PrefixIndex& user_defined_;
  Charsmap charsmap_;
};

class PieceEncoder {
 public:
  virtual ~PieceEncoder() = default;
  // `text` is not empty, and outlives the result. Joined, the parts are the text.
  virtual std::vector<PieceMatch> operator()(std::string_view text) const = 0;
};

// BPE: merges the pair of the highest score first; with `by_id` that of the lowest id, where all types of pieces are
// normal.
std::unique_ptr<PieceEncoder> make_merging_encoder(const PieceModel& model, const PrefixIndex& user_defined,
                                                   bool by_id);
// Unigram: the pieces with the largest sum of scores.
std::unique_ptr<PieceEncoder> make_unigram_encoder(const PieceModel& model);

// Bytes of the character that begins at `at`, by its first byte, as in the library.
inline std::size_t character_size(std::string_view text, std::size_t at) {
  const unsigned char first = text[at];
  const std::size_t size = first < 0xc0 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  return size < text.size() - at ? size : text.size() - at;
}

}  // namespace edgelm::capi
