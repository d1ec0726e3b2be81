// The continuation of one prompt: chooses tokens, converts them to text, decides when it ends, and takes the times. As
// `Continuation` and `TextStream` of edgelm/generation/stream.py.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "capi/generation/model.h"
#include "capi/generation/prefix_cache.h"
#include "capi/generation/stop_strings.h"
#include "capi/generation/turns.h"

namespace edgelm::capi {

using Clock = std::chrono::steady_clock;

class Continuation {
 public:
  // `tokenizer` null: the text stays empty. `started`: when the call began. Throws Error(EDGELM_INVALID_ARGUMENT) for
  // options out of range.
  Continuation(std::vector<TokenId> prompt, const GenerateOptions& options, std::shared_ptr<const Tokenizer> tokenizer,
               const std::set<std::int64_t>& end_ids, const Runtime& runtime, Clock::time_point started);

  // Generate to the end. The call has its turn.
  Generation run(Runtime& runtime, PrefixCache& cache, const Turn& turn);

 private:
  void step(Runtime& runtime, PrefixCache& cache, const Turn& turn);
  void take(TokenId token, bool full);
  void show(std::string text);
  double spent() const;

  std::vector<TokenId> prompt_;
  const GenerateOptions& options_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::optional<Detokenizer> pieces_;
  StopStrings stops_;
  Sampler sampler_;
  const std::set<std::int64_t>& end_ids_;
  Clock::time_point started_;
  Clock::duration callback_time_{};
  std::optional<TokenId> token_;
  std::optional<edgelm_stop_reason> reason_;
  bool stopped_by_callback_ = false;
  Generation result_;
};

}  // namespace edgelm::capi
