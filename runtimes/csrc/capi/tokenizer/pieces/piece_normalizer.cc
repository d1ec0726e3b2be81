#include <algorithm>

#include "capi/tokenizer/pieces/piece_encoder.h"

namespace edgelm::capi {

namespace {

// What rules may make of a text. NFKC makes it at most 18 times as long; a damaged file could make it any size.
constexpr std::size_t kMaxGrowth = 64, kMinLimit = 1 << 20;

constexpr std::string_view kSpace = "\u2581", kReplacement = "\ufffd";

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

}  // namespace

PieceNormalizer::PieceNormalizer(const PieceModel& model, const PrefixIndex& user_defined, const std::string& path)
    : path_(path), model_(model), user_defined_(user_defined), charsmap_(model.charsmap, path) {}

std::string_view PieceNormalizer::next(std::string_view text, std::size_t at, std::size_t& size) const {
  std::uint32_t value;
  if (!user_defined_.empty() && (size = user_defined_.longest(text, at, value)) != 0) return text.substr(at, size);
  std::string_view replacement;
  size = charsmap_.longest(text, at, replacement);
  if (size != 0) return replacement;
  // A rule may end within a character, but then the file is damaged.
  if ((static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) {
    size = 1;
    return kReplacement;
  }
  size = character_size(text, at);
  return text.substr(at, size);
}

std::string PieceNormalizer::operator()(std::string_view text) const {
  std::string result;
  std::size_t at = 0, size = 0;
  const bool removes = model_.remove_extra_whitespaces;
  while (removes && at < text.size() && next(text, at, size) == " ") at += size;
  if (at == text.size()) return result;
  const std::string_view space = model_.escape_whitespaces ? kSpace : " ";
  const std::size_t limit = std::max(kMinLimit, kMaxGrowth * text.size());
  result.reserve(text.size() + text.size() / 2);
  if (model_.dummy_prefix && !model_.whitespace_as_suffix) result += space;
  for (bool after_space = removes; at < text.size(); at += size) {
    std::string_view part = next(text, at, size);
    while (after_space && !part.empty() && part[0] == ' ') part.remove_prefix(1);
    if (part.size() > limit || result.size() > limit) {
      fail(EDGELM_TOKENIZER, path_, ": its rules make a text more than ", kMaxGrowth, " times as long");
    }
    for (const char character : part) {
      character == ' ' ? result.append(space) : result.append(1, character);
    }
    if (!part.empty()) after_space = removes && part.back() == ' ';
  }
  while (removes && ends_with(result, space)) result.resize(result.size() - space.size());
  if (model_.dummy_prefix && model_.whitespace_as_suffix) result += space;
  return result;
}

}  // namespace edgelm::capi
