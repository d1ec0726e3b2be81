#include "capi/runtime/options.h"

#include <algorithm>

#include "capi/runtime/cpu_cores.h"

namespace edgelm::capi {

void check_options(const RuntimeOptions& options) {
  const auto require = [](const char* name, std::int64_t value) {
    if (value < 0) {
      fail(EDGELM_INVALID_ARGUMENT, name, " is ", value, ": it has to be 1 or more, or 0 for the default");
    }
  };
  require("threads", options.threads);
  require("context_length", options.context_length);
  require("chunk", options.chunk);
  if (options.threads == 0) return;
  const std::string problem = thread_problem(options.threads);
  if (!problem.empty()) fail(EDGELM_INVALID_ARGUMENT, problem);
}

void set_sizes(Runtime& runtime, const Bundle& bundle, const RuntimeOptions& options, std::int64_t chunk) {
  const ModelInfo& model = bundle.manifest().model;
  runtime.vocab_size = model.vocab_size;
  runtime.model_context_length = model.context_length;
  runtime.context_length = options.context_length;
  if (options.context_length == 0) runtime.context_length = std::min(model.context_length, kDefaultContextLength);
  if (runtime.context_length > model.context_length) {
    fail(EDGELM_INVALID_ARGUMENT, "context_length is ", options.context_length, ": give 1 to ", model.context_length,
         ", the model's limit");
  }
  runtime.chunk = std::min(options.chunk == 0 ? chunk : options.chunk, runtime.context_length);
  runtime.threads = chosen_threads(options);
}

int chosen_threads(const RuntimeOptions& options) { return options.threads == 0 ? allowed_cores() : options.threads; }

}  // namespace edgelm::capi
