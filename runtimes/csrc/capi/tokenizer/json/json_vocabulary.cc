// A tokenizer.json: added tokens are split off, the rest is normalised, cut into words, and each word made into ids.
#include <algorithm>
#include <unordered_map>

#include "capi/common/error.h"
#include "capi/common/unicode.h"
#include "capi/tokenizer/added_tokens.h"
#include "capi/tokenizer/json/model.h"
#include "capi/tokenizer/json/normalizer.h"
#include "capi/tokenizer/json/pre_tokenizer.h"

namespace edgelm::capi {

namespace {

constexpr std::size_t kLongestCached = 64;  // bytes of a word; longer ones seldom occur twice

class JsonVocabulary final : public Vocabulary {
 public:
  JsonVocabulary(const std::string& path, const Members& settings)
      : file_(read_tokenizer_file(path)),
        pre_tokenizer_(settings),
        model_(open_word_model(settings, file_, path)),
        added_(settings, normalizer_of(settings)),
        size_(settings.integer("size", 1, TokenTable::kMaxIds)) {
    const Members decoder = settings.object("decoder");
    byte_level_ = decoder.boolean("byte_level");
    byte_tokens_ = decoder.boolean("byte_tokens");
    for (const Json& pair : decoder.array("replace")) {
      const bool strings = pair.is_array() && pair.array().size() == 2 && pair.array()[0].is_string() &&
                           pair.array()[1].is_string() && !pair.array()[0].string().empty();
      if (!strings) decoder.refuse("replace", "is not a list of two strings each");
      replace_.emplace_back(pair.array()[0].string(), pair.array()[1].string());
    }
    for (const Json& json : settings.array("added_tokens")) {
      const Members token(json, settings.where() + ": an added token", EDGELM_TOKENIZER);
      const auto id = static_cast<TokenId>(token.integer("id", 0, TokenTable::kMaxIds - 1));
      texts_[id] = token.string(token.has("decoded") ? "decoded" : "content");
    }
  }

  void encode(std::string_view text, std::vector<TokenId>& ids) const override {
    const std::vector<TextPart> parts = added_.split(text);
    Words words;
    // Where in `ids` those of a word are.
    std::unordered_map<std::string_view, std::pair<std::size_t, std::size_t>> known;
    for (const TextPart& part : parts) {
      if (part.id) {
        ids.push_back(*part.id);
        continue;
      }
      words.words.assign(1, {part.text, part.at_start});
      pre_tokenizer_.run(words);
      for (const Word& word : words.words) {
        if (word.text.size() > kLongestCached) {
          model_->encode(word.text, ids);
          continue;
        }
        const auto [found, is_new] = known.try_emplace(word.text, ids.size(), 0);
        auto& [start, count] = found->second;
        if (is_new) {
          model_->encode(word.text, ids);
          count = ids.size() - start;
        } else {
          for (std::size_t i = 0; i < count; ++i) ids.push_back(ids[start + i]);
        }
      }
    }
  }

  std::string token_bytes(TokenId id) const override {
    const auto token = text_of(id);
    if (!token) return {};
    if (byte_level_) return bytes_of_characters(*token);
    std::string text(*token);
    for (const auto& [old, replacement] : replace_) {
      for (std::size_t at = 0; (at = text.find(old, at)) != std::string::npos; at += replacement.size()) {
        text.replace(at, old.size(), replacement);
      }
    }
    if (byte_tokens_) {
      if (const int byte = byte_of(text); byte >= 0) return std::string(1, static_cast<char>(byte));
    }
    return text;
  }

  bool is_byte(TokenId id) const override {
    const auto token = text_of(id);
    return byte_tokens_ && token && byte_of(*token) >= 0;
  }

 private:
  static AddedTokens::Normalizer normalizer_of(const Members& settings) {
    auto normalizer = std::make_shared<const Normalizer>(settings);
    if (normalizer->empty()) return {};
    return [normalizer](std::string_view text) { return (*normalizer)(text); };
  }

  std::optional<std::string_view> text_of(TokenId id) const {
    if (id < 0 || id >= size_) return {};
    const auto found = texts_.find(id);
    if (found != texts_.end()) return found->second;
    return file_.tokens.token(id);
  }

  // A token with any other character is its own text.
  static std::string bytes_of_characters(std::string_view token) {
    std::string result;
    for (std::size_t at = 0; at < token.size();) {
      const int byte = byte_of_character(next_character(token, at));
      if (byte < 0) return std::string(token);
      result += static_cast<char>(byte);
    }
    return result;
  }

  // The byte of a token like "<0x0A>"; -1 for another token.
  static int byte_of(std::string_view token) {
    if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
    int value = 0;
    for (const char letter : token.substr(3, 2)) {
      const char small = static_cast<char>(letter | 32);
      const bool digit = letter >= '0' && letter <= '9';
      if (!digit && !(small >= 'a' && small <= 'f')) return -1;
      value = value * 16 + (digit ? letter - '0' : small - 'a' + 10);
    }
    return value;
  }

  const TokenizerFile file_;
  const PreTokenizer pre_tokenizer_;
  const std::unique_ptr<WordModel> model_;
  const AddedTokens added_;
  const std::int64_t size_;
  bool byte_level_ = false, byte_tokens_ = false;
  std::vector<std::pair<std::string, std::string>> replace_;
  std::unordered_map<TokenId, std::string> texts_;  // of added tokens, as they are decoded
};

}  // namespace

std::unique_ptr<WordModel> open_word_model(const Members& settings, const TokenizerFile& file,
                                           const std::string& path) {
  const Members model = settings.object("model");
  const std::string& type = model.string("type");
  if (type == "BPE") return open_bpe(model, file, path);
  if (type == "Unigram") return open_unigram(model, file, path);
  model.refuse("type", "is " + quoted(type) + ", which this library does not have");
}

std::unique_ptr<Vocabulary> open_json_vocabulary(const std::string& path, const Members& settings) {
  return std::make_unique<JsonVocabulary>(path, settings);
}

}  // namespace edgelm::capi
