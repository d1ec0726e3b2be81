// A tokenizer.model as a Vocabulary: PieceVocabulary of edgelm/tokenization/vocabulary.py.
#include <algorithm>
#include <array>
#include <map>

#include "capi/tokenizer/added_tokens.h"
#include "capi/tokenizer/pieces/piece_encoder.h"

namespace edgelm::capi {

namespace {

constexpr std::string_view kSpace = "\u2581";

std::string replaced(std::string_view text, std::string_view old, std::string_view by) {
  std::string result;
  std::size_t at = 0;
  for (std::size_t found; (found = text.find(old, at)) != std::string_view::npos; at = found + old.size()) {
    result.append(text, at, found - at);
    result += by;
  }
  return result.append(text, at, std::string_view::npos);
}

bool starts_with(std::string_view text, std::string_view start) { return text.substr(0, start.size()) == start; }

// The steps before added tokens are looked for: replacements of strings.
AddedTokens::Normalizer normalizer_of(const Members& settings) {
  std::vector<std::pair<std::string, std::string>> steps;
  for (const Json& item : settings.array("normalizer")) {
    const Members step(item, settings.where() + ": normalizer", EDGELM_TOKENIZER);
    const std::string& old = step.object("pattern").string("String");
    if (step.string("type") != "Replace" || old.empty()) step.refuse("type", "is not a Replace of a string");
    steps.emplace_back(old, step.string("content"));
  }
  if (steps.empty()) return {};
  return [steps](std::string_view text) {
    std::string result(text);
    for (const auto& [old, by] : steps) result = replaced(result, old, by);
    return result;
  };
}

class PieceVocabulary : public Vocabulary {
 public:
  PieceVocabulary(const std::string& path, const Members& settings)
      : path_(path),
        model_(path),
        merges_(settings.string("rules") == "merges"),
        drops_unknown_(settings.boolean("drops_unknown")),
        unknown_text_(settings.string("unknown_text")),
        prefix_(settings.string("prefix")),
        added_(settings, normalizer_of(settings)) {
    if (!merges_ && settings.string("rules") != "model") settings.refuse("rules", "is neither merges nor model");
    if (prefix_ != "never" && prefix_ != "first" && prefix_ != "always") {
      settings.refuse("prefix", "is neither never, first nor always");
    }
    for (const Json& id : settings.array("verbatim")) {
      if (!id.is_integer()) settings.refuse("verbatim", "has something that is no token id");
      verbatim_.push_back(id.integer());
    }
    std::sort(verbatim_.begin(), verbatim_.end());
    for (const AddedToken& token : added_.tokens()) {
      if (static_cast<std::uint32_t>(token.id) >= model_.size()) beyond_.emplace(token.id, token.content);
    }
    for (int byte = 0; byte < 256; ++byte) {
      constexpr char kDigits[] = "0123456789ABCDEF";
      bytes_[byte] = model_.id_of(
          concat("<0x", std::string(1, kDigits[byte >> 4]), std::string(1, kDigits[byte & 15]), ">"));
    }
    make_encoder();
  }

  void encode(std::string_view text, std::vector<TokenId>& ids) const override {
    for (const TextPart& part : added_.split(text)) {
      if (part.id) {
        ids.push_back(*part.id);
      } else {
        const bool prefixed = prefix_ == "always" || (prefix_ == "first" && part.at_start);
        const bool has_space = starts_with(part.text, " ") || starts_with(part.text, kSpace);
        encode_part(prefixed && !has_space ? " " + part.text : part.text, ids);
      }
    }
  }

  std::string token_bytes(TokenId id) const override {
    const std::optional<std::string_view> token = this->token(id);
    if (!token) return "";
    if (!merges_ && std::binary_search(verbatim_.begin(), verbatim_.end(), id)) return std::string(*token);
    if (is_byte(id)) return std::string(1, static_cast<char>(byte_of_name(*token).value_or(0)));
    if (is_unknown(id) && !merges_) return unknown_text_;
    return replaced(*token, kSpace, " ");
  }

  std::string fingerprint_bytes(TokenId id) const override { return is_unknown(id) ? unknown_text_ : token_bytes(id); }

  bool is_byte(TokenId id) const override {
    const std::optional<std::string_view> token = this->token(id);
    if (!token) return false;
    if (merges_) return byte_of_name(*token).has_value();
    return static_cast<std::uint32_t>(id) < model_.size() && model_.kind(id) == PieceKind::kByte;
  }

 private:
  void make_encoder() {
    if (!merges_) {
      for (std::uint32_t id = 0; id < model_.size(); ++id) {
        if (model_.kind(id) == PieceKind::kUserDefined) user_defined_.add(model_.name(id), id);
      }
      user_defined_.build();
      normalizer_ = std::make_unique<PieceNormalizer>(model_, user_defined_, path_);
    }
    if (merges_ || model_.model_type == kBpeType) {
      encoder_ = make_merging_encoder(model_, user_defined_, merges_);
    } else if (model_.model_type == kUnigramType) {
      encoder_ = make_unigram_encoder(model_);
    } else {
      fail(EDGELM_TOKENIZER, path_, ": it is neither a BPE nor a Unigram model, and not supported without Python");
    }
  }

  void encode_part(const std::string& text, std::vector<TokenId>& ids) const {
    const std::string normal = merges_ ? replaced(text, " ", kSpace) : (*normalizer_)(text);
    if (normal.empty()) return;
    bool after_unknown = false;
    for (const PieceMatch& match : (*encoder_)(normal)) {
      const bool unknown = match.id == model_.unknown_id();
      if (unknown && model_.byte_fallback) {
        for (const unsigned char byte : match.text) add(bytes_[byte], ids);
      } else if (!unknown || !after_unknown) {  // consecutive unknown pieces are one
        add(match.id, ids);
      }
      after_unknown = unknown;
    }
  }

  void add(std::uint32_t id, std::vector<TokenId>& ids) const {
    if (!drops_unknown_ || id != model_.unknown_id()) ids.push_back(static_cast<TokenId>(id));
  }

  bool is_unknown(TokenId id) const { return static_cast<std::uint32_t>(id) == model_.unknown_id(); }

  // The string of a token.
  std::optional<std::string_view> token(TokenId id) const {
    if (id >= 0 && static_cast<std::uint32_t>(id) < model_.size()) return model_.name(id);
    const auto found = beyond_.find(id);
    if (found == beyond_.end()) return {};
    return found->second;
  }

  const std::string path_;
  const PieceModel model_;
  const bool merges_, drops_unknown_;
  const std::string unknown_text_, prefix_;
  const AddedTokens added_;
  std::vector<std::int64_t> verbatim_;     // sorted
  std::map<TokenId, std::string> beyond_;  // added tokens that are no pieces
  std::array<std::uint32_t, 256> bytes_;   // pieces of single bytes
  PrefixIndex user_defined_;
  std::unique_ptr<PieceNormalizer> normalizer_;
  std::unique_ptr<PieceEncoder> encoder_;
};

}  // namespace

std::unique_ptr<Vocabulary> open_piece_vocabulary(const std::string& path, const Members& settings) {
  return std::make_unique<PieceVocabulary>(path, settings);
}

}  // namespace edgelm::capi
