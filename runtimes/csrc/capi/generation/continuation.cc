#include "capi/generation/continuation.h"

#include <algorithm>

#include "capi/common/error.h"

namespace edgelm::capi {
namespace {

Sampling checked(const GenerateOptions& options) {
  if (options.max_tokens && *options.max_tokens < 1)
    fail(EDGELM_INVALID_ARGUMENT, "max_tokens is ", *options.max_tokens,
         ": it has to be an integer, 1 or more, or -1 for no limit (0 is the default, 256)");
  options.sampling.check();
  return options.sampling;
}

}  // namespace

Continuation::Continuation(std::vector<TokenId> prompt, const GenerateOptions& options,
                           std::shared_ptr<const Tokenizer> tokenizer, const std::set<std::int64_t>& end_ids,
                           const Runtime& runtime, Clock::time_point started)
    : prompt_(std::move(prompt)),
      options_(options),
      tokenizer_(std::move(tokenizer)),
      stops_(options.stop),
      sampler_(checked(options), prompt_, runtime.vocab_size),
      end_ids_(end_ids),
      started_(started) {
  if (tokenizer_) pieces_.emplace(*tokenizer_);
  result_.timings.prompt_tokens = std::int64_t(prompt_.size());
}

Generation Continuation::run(Runtime& runtime, PrefixCache& cache, const Turn& turn) {
  Timings& timings = result_.timings;
  try {
    while (!reason_ && !stopped_by_callback_) step(runtime, cache, turn);
  } catch (const Error& error) {
    if (error.code != EDGELM_CANCELLED || !turn.cancelled()) throw;
  }
  result_.reason = reason_.value_or(EDGELM_STOP_INTERRUPTED);
  if (timings.decoded_tokens > 0) timings.decode_seconds = std::max(0.0, spent() - timings.time_to_first_token);
  return std::move(result_);
}

// Compute one token, and pass on the text that may be shown now.
void Continuation::step(Runtime& runtime, PrefixCache& cache, const Turn& turn) {
  turn.check();
  Timings& timings = result_.timings;
  if (!token_) {
    const auto began = Clock::now();
    const bool exact = options_.sampling.seed && !options_.reuse;
    const auto [logits, reused] = cache.prefill(prompt_, exact, [&] { turn.check(); });
    timings.reused_tokens = reused;
    timings.prefill_seconds = std::chrono::duration<double>(Clock::now() - began).count();
    token_ = sampler_.sample(logits);
    timings.time_to_first_token = spent();
  } else {
    cache.appending(*token_);
    token_ = options_.sampling.plain() ? runtime.decode_greedy(*token_) : sampler_.sample(runtime.decode(*token_));
    ++timings.decoded_tokens;
  }
  take(*token_, runtime.position() >= runtime.context_length);
}

// Append a token. `full`: the context has no room for another one.
void Continuation::take(TokenId token, bool full) {
  std::string text;
  bool stopped = false;
  if (end_ids_.count(token) != 0) {
    reason_ = EDGELM_STOP_EOS;
  } else {
    result_.tokens.push_back(token);
    std::tie(text, stopped) = stops_.push(pieces_ ? pieces_->push(token) : std::string());
    if (!stopped && (full || std::int64_t(result_.tokens.size()) == options_.max_tokens)) reason_ = EDGELM_STOP_LENGTH;
  }
  if (reason_) {
    // Add the text held back: bytes of an incomplete character, the beginning of a stop string.
    auto [more, found] = stops_.push(pieces_ ? pieces_->flush() : std::string());
    stopped = found;
    text += more;
    if (!stopped) text += stops_.flush();
  }
  if (stopped) reason_ = EDGELM_STOP_STRING;
  show(std::move(text));
}

void Continuation::show(std::string text) {
  if (text.empty()) return;
  result_.text += text;
  if (!options_.on_text) return;
  const auto began = Clock::now();
  stopped_by_callback_ = !options_.on_text(text);
  callback_time_ += Clock::now() - began;
}

// Seconds since the call began, without those of the callback.
double Continuation::spent() const {
  return std::chrono::duration<double>(Clock::now() - started_ - callback_time_).count();
}

}  // namespace edgelm::capi
