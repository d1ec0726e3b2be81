// Reuse of the KV cache for the tokens that a new prompt shares with the last one, as edgelm/generation/prefix_cache.py.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "capi/runtime/runtime.h"

namespace edgelm::capi {

// Runs prompts and continuations on a runtime, and knows the token of each cached position.
class PrefixCache {
 public:
  using Ids = std::vector<std::int32_t>;

  // The last prompt that was prefilled, and the logits after it. `fresh`: these are the bits of a fresh model.
  struct Prefilled {
    Ids tokens;
    std::vector<float> logits;
    bool fresh = false;
  };

  explicit PrefixCache(Runtime& runtime) : runtime_(runtime) {}

  // Prefill `tokens`; return the logits after them, valid until the next call, and the number of tokens that were cached
  // by an earlier call. `exact`: logits and cache must equal those of a fresh model to the last bit. `check` is called
  // between chunks, and may throw.
  std::pair<const float*, std::int64_t> prefill(const Ids& tokens, bool exact, const std::function<void()>& check);
  // Call `block(logits, rows)` for the logits after each of the last `rows` tokens.
  void logits_of_last(const Ids& tokens, std::size_t rows,
                      const std::function<void(const float* logits, std::int64_t rows)>& block);
  // Before a token is appended by the runtime: it will be cached.
  void appending(std::int32_t token);

  // Tokens of the cached positions.
  Ids cached() const;
  const Prefilled& last_prompt() const { return last_prompt_; }  // no tokens: none
  // How many of them, in whole chunks, have the bits that a fresh model has for any prompt that begins with them.
  std::int64_t fresh_tokens() const { return std::int64_t(fresh_); }
  // After the runtime's cache was replaced or emptied.
  void replace(Ids cached, Prefilled last_prompt, std::int64_t fresh_tokens);

 private:
  std::size_t common(const Ids& tokens) const;
  void truncate(std::size_t length);  // before the tokens behind it are replaced

  Runtime& runtime_;
  Ids cached_;  // entries beyond the runtime's position are not cached
  Prefilled last_prompt_;
  std::size_t fresh_ = 0;  // see fresh_tokens; a multiple of the chunk
};

}  // namespace edgelm::capi
