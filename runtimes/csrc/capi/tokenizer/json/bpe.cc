// Byte pair encoding, as models/bpe of the `tokenizers` library: the merge of the lowest rank first, of equal ones the
// leftmost.
#include <algorithm>
#include <array>
#include <queue>

#include "capi/common/error.h"
#include "capi/common/unicode.h"
#include "capi/tokenizer/json/model.h"

namespace edgelm::capi {

namespace {

struct Symbol {
  TokenId id;
  std::int32_t previous, next;  // -1: none
  bool removed = false;
};

struct Candidate {
  std::uint32_t rank;
  std::int32_t at;
  TokenId id;
  bool operator<(const Candidate& other) const {  // a heap has its largest on top
    return rank != other.rank ? rank > other.rank : at > other.at;
  }
};

class Bpe final : public WordModel {
 public:
  Bpe(const Members& settings, const TokenizerFile& file, std::string path)
      : file_(file),
        path_(std::move(path)),
        fuse_unknown_(settings.boolean("fuse_unk")),
        byte_fallback_(settings.boolean("byte_fallback")),
        ignore_merges_(settings.boolean("ignore_merges")) {
    if (settings.has("end_of_word_suffix")) suffix_ = settings.string("end_of_word_suffix");
    has_unknown_ = settings.has("unk_token");
    if (settings.has("unk_id")) unknown_ = static_cast<TokenId>(settings.integer("unk_id", 0, TokenTable::kMaxIds - 1));
    for (char32_t character = 0; character < characters_.size(); ++character) {
      std::string text;
      append_utf8(text, character);
      characters_[character] = file_.tokens.find(text);
    }
    for (int byte = 0; byte < 256; ++byte) {
      bytes_[byte] = file_.tokens.find(byte_token(static_cast<unsigned char>(byte)));
    }
  }

  void encode(std::string_view word, std::vector<TokenId>& ids) const override {
    if (ignore_merges_) {
      const TokenId whole = file_.tokens.find(word);
      if (whole >= 0) return ids.push_back(whole);
    }
    std::vector<Symbol> symbols;
    symbols.reserve(word.size());
    split(word, symbols);
    merge(symbols);
    for (const Symbol& symbol : symbols) {
      if (!symbol.removed) ids.push_back(symbol.id);
    }
  }

 private:
  TokenId find(std::string_view text) const {
    std::size_t at = 0;
    const char32_t character = next_character(text, at);
    return at == text.size() && character < characters_.size() ? characters_[character] : file_.tokens.find(text);
  }

  void split(std::string_view word, std::vector<Symbol>& symbols) const {
    TokenId unknown = TokenTable::kNone;  // one that is still to be added
    const auto add = [&](TokenId id) {
      const auto at = static_cast<std::int32_t>(symbols.size());
      if (at > 0) symbols.back().next = at;
      symbols.push_back({id, at - 1, -1});
    };
    std::string last;
    for (std::size_t at = 0; at < word.size();) {
      const std::size_t start = at;
      next_character(word, at);
      std::string_view text = word.substr(start, at - start);
      if (at == word.size() && !suffix_.empty()) text = last.append(text).append(suffix_);
      const TokenId id = find(text);
      if (id >= 0) {
        if (unknown >= 0) add(unknown);
        unknown = TokenTable::kNone;
        add(id);
      } else if (byte_fallback_ && add_bytes(text, add)) {
        continue;  // the library adds a pending unknown token after them
      } else if (has_unknown_) {
        if (unknown >= 0 && !fuse_unknown_) add(unknown);
        if (!unknown_) fail(EDGELM_TOKENIZER, path_, ": its vocabulary has no token for what it cannot encode");
        unknown = *unknown_;
      }
    }
    if (unknown >= 0) add(unknown);
  }

  template <class Add>
  bool add_bytes(std::string_view text, const Add& add) const {
    for (const char byte : text) {
      if (bytes_[static_cast<unsigned char>(byte)] < 0) return false;
    }
    for (const char byte : text) add(bytes_[static_cast<unsigned char>(byte)]);
    return true;
  }

  void merge(std::vector<Symbol>& symbols) const {
    std::priority_queue<Candidate> queue;
    const auto offer = [&](std::int32_t at, TokenId left, TokenId right) {
      if (const auto* found = file_.merges.find(left, right)) queue.push({found->rank, at, found->id});
    };
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      offer(static_cast<std::int32_t>(i), symbols[i].id, symbols[i + 1].id);
    }
    while (!queue.empty()) {
      const Candidate top = queue.top();
      queue.pop();
      Symbol& left = symbols[top.at];
      if (left.removed || left.next < 0) continue;
      Symbol& right = symbols[left.next];
      // The candidate may be of symbols that are merged by now. As in the library, another pair counts if it makes the
      // same token.
      const auto* current = file_.merges.find(left.id, right.id);
      if (current == nullptr || current->id != top.id) continue;
      left.id = top.id;
      left.next = right.next;
      right.removed = true;
      if (left.next >= 0) symbols[left.next].previous = top.at;
      if (left.previous >= 0) offer(left.previous, symbols[left.previous].id, left.id);
      if (left.next >= 0) offer(top.at, left.id, symbols[left.next].id);
    }
  }

  const TokenizerFile& file_;
  const std::string path_;
  const bool fuse_unknown_, byte_fallback_, ignore_merges_;
  bool has_unknown_ = false;
  std::optional<TokenId> unknown_;
  std::string suffix_;
  std::array<TokenId, 1024> characters_;  // ids of the most frequent characters
  std::array<TokenId, 256> bytes_;
};

}  // namespace

std::unique_ptr<WordModel> open_bpe(const Members& settings, const TokenizerFile& file, const std::string& path) {
  if (!file.has_merges || !file.scores.empty()) {
    fail(EDGELM_TOKENIZER, path, ": its BPE has no merges or no vocabulary; copy or export the bundle again");
  }
  return std::make_unique<Bpe>(settings, file, path);
}

std::string byte_token(unsigned char byte) {
  constexpr const char* kDigits = "0123456789ABCDEF";
  return std::string("<0x") + kDigits[byte >> 4] + kDigits[byte & 15] + '>';
}

}  // namespace edgelm::capi
