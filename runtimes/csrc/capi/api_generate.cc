// The C functions of edgelm.h: generation, logits and sessions.
#include <algorithm>

#include "capi/api_support.h"

using namespace edgelm::capi;

namespace {

GenerateOptions options_of(const edgelm_generate_options* options) {
  const edgelm_generate_options given = options_at(options, "edgelm_generate_options");
  GenerateOptions wanted;
  if (given.max_tokens == -1) wanted.max_tokens.reset();
  else if (given.max_tokens != 0) wanted.max_tokens = given.max_tokens;
  wanted.sampling.temperature = given.temperature;
  wanted.sampling.top_k = given.top_k;
  if (given.top_p != 0) wanted.sampling.top_p = given.top_p;
  wanted.sampling.min_p = given.min_p;
  if (given.repetition_penalty != 0) wanted.sampling.repetition_penalty = given.repetition_penalty;
  if (given.seed != nullptr) wanted.sampling.seed = *given.seed;
  if (given.stop_count > 0) require_given(given.stop, "stop");
  for (std::size_t i = 0; i < given.stop_count; ++i) {
    require_given(given.stop[i], "a stop string");
    wanted.stop.emplace_back(given.stop[i]);
  }
  if (given.reuse != 0 && given.reuse != 1)
    fail(EDGELM_INVALID_ARGUMENT, "reuse is ", given.reuse, ": it has to be 0 or 1");
  wanted.reuse = given.reuse == 1;
  if (given.on_text != nullptr)
    wanted.on_text = [on_text = given.on_text, user = given.user](std::string_view text) {
      return on_text(user, text.data(), text.size()) == 0;
    };
  return wanted;
}

// `generate(model)` returns the result.
template <class Generate>
edgelm_error* generated(edgelm_model* model, edgelm_generation** generation, Generate&& generate) noexcept {
  return guarded([&] {
    const std::shared_ptr<Model> opened = held(model);
    require_given(generation, "generation");
    *generation = new edgelm_generation{generate(*opened)};
  });
}

}  // namespace

// ---- generation -------------------------------------------------------------------------------------------------------

edgelm_error* edgelm_generate(edgelm_model* model, const int32_t* ids, size_t count,
                              const edgelm_generate_options* options, edgelm_generation** generation) {
  return generated(model, generation,
                   [&](Model& opened) { return opened.generate(ids_at(ids, count), options_of(options)); });
}

edgelm_error* edgelm_generate_text(edgelm_model* model, const char* prompt, size_t size,
                                   const edgelm_generate_options* options, edgelm_generation** generation) {
  return generated(model, generation, [&](Model& opened) {
    return opened.generate(text_at(prompt, size, "prompt"), options_of(options));
  });
}

edgelm_error* edgelm_chat(edgelm_model* model, const char* messages, size_t size,
                          const edgelm_generate_options* options, edgelm_generation** generation) {
  return generated(model, generation, [&](Model& opened) {
    const Json parsed = Json::parse(text_at(messages, size, "messages"), "messages", EDGELM_INVALID_ARGUMENT);
    return opened.chat(parsed, options_of(options));
  });
}

void edgelm_cancel(edgelm_model* model) {
  if (model == nullptr) return;
  edgelm_error_free(guarded([&] { held(model)->cancel(); }));
}

const char* edgelm_generation_text(const edgelm_generation* generation, size_t* size) {
  if (size != nullptr) *size = generation == nullptr ? 0 : generation->result.text.size();
  return generation == nullptr ? "" : generation->result.text.c_str();
}

const int32_t* edgelm_generation_tokens(const edgelm_generation* generation, size_t* count) {
  if (count != nullptr) *count = generation == nullptr ? 0 : generation->result.tokens.size();
  return generation == nullptr ? nullptr : generation->result.tokens.data();
}

edgelm_stop_reason edgelm_generation_reason(const edgelm_generation* generation) {
  return generation == nullptr ? EDGELM_STOP_INTERRUPTED : generation->result.reason;
}

edgelm_error* edgelm_generation_timings(const edgelm_generation* generation, edgelm_timings* timings) {
  return guarded([&] {
    require_given(generation, "generation");
    const Timings& from = generation->result.timings;
    edgelm_timings filled = EDGELM_INIT(edgelm_timings);
    filled.prompt_tokens = from.prompt_tokens;
    filled.reused_tokens = from.reused_tokens;
    filled.decoded_tokens = from.decoded_tokens;
    filled.prefill_seconds = from.prefill_seconds;
    filled.time_to_first_token = from.time_to_first_token;
    filled.decode_seconds = from.decode_seconds;
    fill_in(timings, "edgelm_timings", filled);
  });
}

void edgelm_generation_free(edgelm_generation* generation) { delete generation; }

// ---- logits and the KV cache ------------------------------------------------------------------------------------------

edgelm_error* edgelm_logits(edgelm_model* model, const int32_t* ids, size_t count, size_t positions, float* logits,
                            size_t capacity) {
  return guarded([&] {
    const auto opened = held(model);
    require_given(logits, "logits");
    const auto vocab_size = std::size_t(opened->runtime().vocab_size);
    if (positions > capacity / vocab_size)
      fail(EDGELM_INVALID_ARGUMENT, "capacity is ", capacity, " floats: ", positions, " positions need ", positions,
           " * ", vocab_size);
    opened->logits(ids_at(ids, count), positions, logits);
  });
}

edgelm_error* edgelm_save_session(edgelm_model* model, const char* path) {
  return guarded([&] {
    const auto opened = held(model);
    require_given(path, "path");
    opened->save_session(path);
  });
}

edgelm_error* edgelm_load_session(edgelm_model* model, const char* path) {
  return guarded([&] {
    const auto opened = held(model);
    require_given(path, "path");
    opened->load_session(path);
  });
}

edgelm_error* edgelm_reset(edgelm_model* model) {
  return guarded([&] { held(model)->reset(); });
}

edgelm_error* edgelm_cached_tokens(edgelm_model* model, int64_t* count) {
  return guarded([&] {
    const auto opened = held(model);
    require_given(count, "count");
    *count = opened->cached_tokens();
  });
}
