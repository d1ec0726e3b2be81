#include <algorithm>
#include <cfloat>

#include "capi/tokenizer/pieces/piece_encoder.h"

namespace edgelm::capi {

namespace {

constexpr float kUnknownPenalty = 10.0f;

class UnigramEncoder : public PieceEncoder {
 public:
  explicit UnigramEncoder(const PieceModel& model) : model_(model) {
    for (std::uint32_t id = 0; id < model.size(); ++id) {
      const PieceKind kind = model.kind(id);
      if (kind == PieceKind::kNormal) {
        least_ = std::min(least_, model.score(id));
        largest_ = std::max(largest_, model.score(id));
      }
      if (kind == PieceKind::kNormal || kind == PieceKind::kUserDefined) index_.add(model.name(id), id);
    }
    index_.build();
  }

  std::vector<PieceMatch> operator()(std::string_view text) const override {
    // The best way to each byte: its last piece, and where that begins.
    struct Best {
      std::uint32_t id;
      std::int64_t start = -1;
      float score = 0;
    };
    std::vector<Best> best(text.size() + 1);
    for (std::size_t at = 0; at < text.size();) {
      const float before = best[at].score;
      const auto reach = [&](std::size_t size, std::uint32_t id, float score) {
        Best& target = best[at + size];
        if (target.start >= 0 && !(score > target.score)) return;
        target = {id, static_cast<std::int64_t>(at), score};
      };
      const std::size_t size = character_size(text, at);
      bool has_character = false;
      index_.each(text, at, [&](std::size_t length, std::uint32_t id) {
        // Rounded to floats as in the library, since the last bit may decide.
        const bool user_defined = model_.kind(id) == PieceKind::kUserDefined;
        const float score = user_defined ? static_cast<float>(length * largest_ - 0.1) : model_.score(id);
        reach(length, id, score + before);
        has_character = has_character || length == size;
      });
      if (!has_character) reach(size, model_.unknown_id(), least_ - kUnknownPenalty + before);
      at += size;
    }
    std::vector<PieceMatch> result;
    for (std::size_t end = text.size(); end > 0; end = best[end].start) {
      result.push_back({text.substr(best[end].start, end - best[end].start), best[end].id});
    }
    std::reverse(result.begin(), result.end());
    return result;
  }

 private:
  const PieceModel& model_;
  PrefixIndex index_;
  float least_ = FLT_MAX, largest_ = FLT_MIN;  // of normal pieces; the library also starts from these
};

}  // namespace

std::unique_ptr<PieceEncoder> make_unigram_encoder(const PieceModel& model) {
  return std::make_unique<UnigramEncoder>(model);
}

}  // namespace edgelm::capi
