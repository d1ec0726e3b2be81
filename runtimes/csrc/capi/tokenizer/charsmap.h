// The precompiled_charsmap of SentencePiece: rules that replace one string by another, in a Darts double-array trie.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "capi/common/error.h"

namespace edgelm::capi {

class Charsmap {
 public:
  Charsmap() = default;  // without rules
  // The bytes of the field. Throws Error(EDGELM_TOKENIZER) with `where` if its sizes are wrong.
  Charsmap(std::string_view data, const std::string& where);

  // The longest rule for what is at `at`: its size in the text, 0 where there is none, and what replaces it.
  std::size_t longest(std::string_view text, std::size_t at, std::string_view& replacement) const;

 private:
  std::uint32_t unit(std::size_t index) const;

  std::string trie_, texts_;  // little-endian units; texts end with a zero
};

}  // namespace edgelm::capi
