#include "capi/generation/prefix_cache.h"

#include <algorithm>

namespace edgelm::capi {

std::pair<const float*, std::int64_t> PrefixCache::prefill(const Ids& tokens, bool exact,
                                                           const std::function<void()>& check) {
  std::size_t reused = common(tokens);
  if (reused == tokens.size()) {
    if (last_prompt_.tokens == tokens && (last_prompt_.fresh || !exact)) {
      runtime_.truncate(std::int64_t(reused));
      return {last_prompt_.logits.data(), std::int64_t(reused)};
    }
    --reused;
  }
  const auto chunk = std::size_t(runtime_.chunk);
  // Whole chunks of a fresh computation: the rest is then computed in the chunks of a fresh model.
  if (exact) reused = std::min(reused, fresh_) / chunk * chunk;
  const bool fresh = reused % chunk == 0 && reused <= fresh_;
  truncate(reused);
  // Set before the prefill: if that is interrupted, the runtime's position tells how many tokens are cached.
  cached_ = tokens;
  last_prompt_ = {};
  const float* logits = nullptr;
  // In the runtime's own chunks, so that the results equal those of a single call.
  for (std::size_t begin = reused; begin < tokens.size(); begin += chunk) {
    check();
    const std::size_t end = std::min(tokens.size(), begin + chunk);
    logits = runtime_.prefill(Ids(tokens.begin() + std::ptrdiff_t(begin), tokens.begin() + std::ptrdiff_t(end)));
  }
  if (fresh) fresh_ = tokens.size() / chunk * chunk;
  last_prompt_ = {tokens, std::vector<float>(logits, logits + runtime_.vocab_size), fresh};
  return {last_prompt_.logits.data(), std::int64_t(reused)};
}

void PrefixCache::logits_of_last(const Ids& tokens, std::size_t rows,
                                 const std::function<void(const float*, std::int64_t)>& block) {
  const std::size_t begin = tokens.size() - rows, reused = std::min(common(tokens), begin);
  truncate(reused);
  cached_ = tokens;
  last_prompt_ = {};
  const auto at = [&](std::size_t index) { return tokens.begin() + std::ptrdiff_t(index); };
  if (reused < begin) runtime_.prefill(Ids(at(reused), at(begin)));
  runtime_.logits_all(Ids(at(begin), tokens.end()), block);
}

void PrefixCache::appending(std::int32_t token) {
  cached_.resize(std::min(cached_.size(), std::size_t(runtime_.position())));
  cached_.push_back(token);
}

PrefixCache::Ids PrefixCache::cached() const {
  const std::size_t count = std::min(cached_.size(), std::size_t(runtime_.position()));
  return Ids(cached_.begin(), cached_.begin() + std::ptrdiff_t(count));
}

void PrefixCache::replace(Ids cached, Prefilled last_prompt, std::int64_t fresh_tokens) {
  cached_ = std::move(cached);
  last_prompt_ = std::move(last_prompt);
  fresh_ = std::size_t(fresh_tokens);
}

void PrefixCache::truncate(std::size_t length) {
  const auto chunk = std::size_t(runtime_.chunk);
  runtime_.truncate(std::int64_t(length));
  fresh_ = std::min(fresh_, length) / chunk * chunk;
}

std::size_t PrefixCache::common(const Ids& tokens) const {
  const std::size_t most = std::min({cached_.size(), tokens.size(), std::size_t(runtime_.position())});
  std::size_t count = 0;
  while (count < most && cached_[count] == tokens[count]) ++count;
  return count;
}

}  // namespace edgelm::capi
