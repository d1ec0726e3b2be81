// The vocabulary and merges of a tokenizer.json, read without building a document: one may have half a million entries.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "capi/tokenizer/vocabulary.h"

namespace edgelm::capi {

// Tokens and their ids.
class TokenTable {
 public:
  TokenTable();
  static constexpr TokenId kNone = -1;
  static constexpr std::int64_t kMaxIds = std::int64_t{1} << 22;  // as in edgelm/tokenization/added_tokens.py

  // Add a token. The last id of a token counts; an earlier one then has no token.
  void add(std::string_view token, TokenId id);
  TokenId find(std::string_view token) const;  // kNone if there is no such token
  std::optional<std::string_view> token(TokenId id) const;
  std::size_t size() const { return entries_.size(); }
  TokenId end_id() const { return static_cast<TokenId>(by_id_.size()); }  // one more than the largest

 private:
  struct Entry {
    std::uint32_t start, size;
    TokenId id;
  };
  std::uint64_t hash(std::string_view text) const;
  std::size_t slot_of(std::string_view token) const;
  std::string_view text_of(const Entry& entry) const { return {text_.data() + entry.start, entry.size}; }
  void grow();

  std::string text_;
  std::vector<Entry> entries_;
  std::vector<std::uint32_t> slots_;  // 1 + index of an entry; 0 is free
  std::vector<std::uint32_t> by_id_;  // the same
  std::uint64_t seed_;                // differs from run to run, so that no file can be made to have one hash only
};

// Merges of two tokens by their ids.
class MergeTable {
 public:
  struct Merge {
    std::uint32_t rank;
    TokenId id;
  };

  MergeTable();
  void add(TokenId left, TokenId right, Merge merge);  // the last one of a pair counts
  const Merge* find(TokenId left, TokenId right) const {
    const std::uint64_t key = key_of(left, right);
    for (std::size_t slot = hash(key) & mask_;; slot = (slot + 1) & mask_) {
      if (slots_[slot].key == key) return &slots_[slot].merge;
      if (slots_[slot].key == kFree) return nullptr;
    }
  }
  void reserve(std::size_t count);

 private:
  static constexpr std::uint64_t kFree = UINT64_MAX;
  struct Slot {
    std::uint64_t key = kFree;
    Merge merge = {};
  };
  static std::uint64_t key_of(TokenId left, TokenId right) {
    return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
  }
  std::uint64_t hash(std::uint64_t key) const {
    key = (key ^ seed_) * 0x9e3779b97f4a7c15;
    return (key ^ key >> 29) * 0xbf58476d1ce4e5b9 >> 20;
  }

  std::vector<Slot> slots_;
  std::size_t mask_ = 0, count_ = 0;
  std::uint64_t seed_;
};

// What a Tokenizer reads from tokenizer.json.
struct TokenizerFile {
  TokenTable tokens;
  std::vector<double> scores;  // of a list of tokens and scores: Unigram
  MergeTable merges;
  bool has_merges = false;
};

// Throws Error(EDGELM_TOKENIZER) if the file cannot be read, is too large, or is damaged.
TokenizerFile read_tokenizer_file(const std::string& path);

}  // namespace edgelm::capi
