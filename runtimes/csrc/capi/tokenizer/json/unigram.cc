// The most probable tokens of a word, as models/unigram of the `tokenizers` library (Viterbi).
#include <algorithm>
#include <limits>
#include <numeric>

#include "capi/common/error.h"
#include "capi/common/unicode.h"
#include "capi/tokenizer/json/model.h"

namespace edgelm::capi {

namespace {

constexpr double kUnknownPenalty = 10.0;
// Comparisons for each byte of a word: tokens are tens of characters long, not thousands.
constexpr std::uint64_t kStepsPerByte = 4096, kLeastSteps = 1000000;

class Unigram final : public WordModel {
 public:
  Unigram(const Members& settings, const TokenizerFile& file, std::string path)
      : file_(file), path_(std::move(path)), byte_fallback_(settings.boolean("byte_fallback")) {
    if (settings.has("unk_id")) {
      unknown_ = static_cast<TokenId>(settings.integer("unk_id", 0, std::int64_t(file.scores.size()) - 1));
    }
    least_score_ = *std::min_element(file.scores.begin(), file.scores.end());
    for (TokenId id = 0; id < file.tokens.end_id(); ++id) {
      if (const auto token = file.tokens.token(id); token && !token->empty()) sorted_.emplace_back(*token, id);
    }
    std::sort(sorted_.begin(), sorted_.end());
  }

  void encode(std::string_view word, std::vector<TokenId>& ids) const override {
    const std::vector<Node> nodes = best(word);
    std::vector<std::string_view> parts;  // from the last to the first
    bool in_unknown = false;
    for (std::size_t end = word.size(); end > 0; end = nodes[end].start) {
      const Node& node = nodes[end];
      const std::string_view part = word.substr(node.start, end - node.start);
      const bool unknown = unknown_ && node.id == *unknown_;
      if (unknown && in_unknown) {
        parts.back() = word.substr(node.start, part.size() + parts.back().size());
      } else {
        parts.push_back(part);
      }
      in_unknown = unknown;
    }
    for (auto part = parts.rbegin(); part != parts.rend(); ++part) add(*part, ids);
  }

 private:
  struct Node {  // the best way to a place
    double score = 0;
    std::size_t start = kUnset;
    TokenId id = 0;
  };
  static constexpr std::size_t kUnset = std::string_view::npos;

  TokenId unknown() const {
    if (!unknown_) fail(EDGELM_TOKENIZER, path_, ": its vocabulary has no token for what it cannot encode");
    return *unknown_;
  }

  std::vector<Node> best(std::string_view word) const {
    std::vector<Node> nodes(word.size() + 1);
    std::uint64_t steps = kLeastSteps + kStepsPerByte * word.size();
    const auto offer = [&](std::size_t start, std::size_t end, double score, TokenId id) {
      Node& node = nodes[end];
      if (node.start == kUnset || score > node.score) node = {score, start, id};
    };
    for (std::size_t start = 0; start < word.size();) {
      const double score = nodes[start].score;
      std::size_t next = start;
      next_character(word, next);
      bool single = false;
      auto low = sorted_.begin(), high = sorted_.end();
      for (std::size_t end = start; end < word.size() && low != high;) {
        if (steps-- == 0) fail(EDGELM_TOKENIZER, path_, ": this text takes too long to encode");
        const std::size_t depth = end - start;
        const auto byte = static_cast<unsigned char>(word[end++]);
        const auto at_depth = [depth](std::string_view token) {
          return depth < token.size() ? static_cast<unsigned char>(token[depth]) : -1;
        };
        low = std::partition_point(low, high, [&](const auto& entry) { return at_depth(entry.first) < byte; });
        high = std::partition_point(low, high, [&](const auto& entry) { return at_depth(entry.first) == byte; });
        if (low == high || low->first.size() != depth + 1) continue;
        offer(start, end, file_.scores[low->second] + score, low->second);
        single = single || end == next;
      }
      if (!single) offer(start, next, least_score_ - kUnknownPenalty + score, unknown());
      start = next;
    }
    return nodes;
  }

  void add(std::string_view part, std::vector<TokenId>& ids) const {
    const TokenId id = file_.tokens.find(part);
    if (id >= 0) return ids.push_back(id);
    std::vector<TokenId> bytes;
    for (const char byte : part) {
      if (!byte_fallback_) break;
      bytes.push_back(file_.tokens.find(byte_token(static_cast<unsigned char>(byte))));
      if (bytes.back() < 0) break;
    }
    if (bytes.size() == part.size() && bytes.back() >= 0) {
      ids.insert(ids.end(), bytes.begin(), bytes.end());
    } else {
      ids.push_back(unknown());
    }
  }

  const TokenizerFile& file_;
  const std::string path_;
  const bool byte_fallback_;
  std::optional<TokenId> unknown_;
  double least_score_;
  std::vector<std::pair<std::string_view, TokenId>> sorted_;
};

}  // namespace

std::unique_ptr<WordModel> open_unigram(const Members& settings, const TokenizerFile& file, const std::string& path) {
  if (file.scores.empty()) fail(EDGELM_TOKENIZER, path, ": its Unigram has no scores; copy or export the bundle again");
  return std::make_unique<Unigram>(settings, file, path);
}

}  // namespace edgelm::capi
