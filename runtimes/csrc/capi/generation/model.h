// A loaded bundle that generates text: tokenizer, chat template, runtime, and the queue of calls. As
// edgelm/generation/language_model.py.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "capi/bundle/bundle.h"
#include "capi/chat/chat_template.h"
#include "capi/generation/sampling.h"
#include "capi/runtime/runtime.h"
#include "capi/tokenizer/tokenizer.h"

namespace edgelm::capi {

// As edgelm.GenerateOptions in Python; checked by `Model`.
struct GenerateOptions {
  std::optional<std::int64_t> max_tokens = 256;  // none: until the model ends the text or the context is full
  Sampling sampling;
  std::vector<std::string> stop;
  bool reuse = false;
  std::function<bool(std::string_view text)> on_text;  // false: stop
};

struct Timings {
  std::int64_t prompt_tokens = 0, reused_tokens = 0, decoded_tokens = 0;
  double prefill_seconds = 0, time_to_first_token = 0, decode_seconds = 0;
};

struct Generation {
  std::string text;
  std::vector<TokenId> tokens;
  edgelm_stop_reason reason = EDGELM_STOP_INTERRUPTED;
  Timings timings;
};

// All members may be called from several threads; those that compute wait for each other in the order of arrival.
class Model {
 public:
  // The tokenizer is read while the runtime loads. A tokenizer that is not supported or damaged is no error here.
  Model(const std::string& path, const RuntimeOptions& options);
  ~Model();

  const Bundle& bundle() const;
  const Runtime& runtime() const;
  // Throws the error of opening it. May outlive the model.
  std::shared_ptr<const Tokenizer> tokenizer() const;
  const char* tokenizer_problem() const;  // why `tokenizer` throws; nullptr if it does not
  bool has_chat_template() const;

  std::string render_chat(const Json& messages, const Json& variables, bool add_generation_prompt) const;
  Generation generate(const std::vector<TokenId>& prompt, const GenerateOptions& options);
  Generation generate(std::string_view prompt, const GenerateOptions& options);
  Generation chat(const Json& messages, const GenerateOptions& options);
  // Logits of the last `positions` of `ids`, [positions, vocab_size], into `logits`.
  void logits(const std::vector<TokenId>& ids, std::size_t positions, float* logits);
  void save_session(const std::string& path);
  void load_session(const std::string& path);
  void reset();
  std::int64_t cached_tokens();
  void cancel();  // ends the call that runs
  // End the call that runs and fail those that wait. Returns when they have ended; in a callback at once.
  void close();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace edgelm::capi
