// The C functions of edgelm.h: library, models, text and tokens. api_generate.cc and api_parity.cc have the others.
#include <algorithm>

#include "capi/api_support.h"

#ifndef EDGELM_VERSION
#error "define EDGELM_VERSION, such as \"0.2.0\""
#endif

using namespace edgelm::capi;

namespace {

edgelm_error* out_of_memory() noexcept {
  // Short enough to need no memory.
  static edgelm_error error{EDGELM_RUNTIME, "out of memory"};
  return &error;
}

std::int32_t id_or_none(const std::optional<std::int64_t>& id) { return id ? std::int32_t(*id) : -1; }

edgelm_model_info info_of(const edgelm_model& handle) {
  const Model& model = *handle.model;
  const Manifest& manifest = model.bundle().manifest();
  const Runtime& runtime = model.runtime();
  edgelm_model_info info = EDGELM_INIT(edgelm_model_info);
  info.name = manifest.model.name.c_str();
  info.family = manifest.model.family.c_str();
  info.recipe = manifest.recipe_name.c_str();
  info.target = manifest.target.c_str();
  info.operators = manifest.ops.c_str();
  info.runtime = runtime.name.c_str();
  info.kv = runtime.kv.c_str();
  info.vocab_size = runtime.vocab_size;
  info.context_length = runtime.context_length;
  info.model_context_length = runtime.model_context_length;
  info.num_layers = manifest.model.num_layers;
  info.num_experts = manifest.model.num_experts;
  info.experts_per_token = manifest.model.experts_per_token;
  info.threads = runtime.threads;
  info.has_chat_template = model.has_chat_template();
  info.bos_id = id_or_none(manifest.bos_id);
  info.pad_id = id_or_none(manifest.pad_id);
  info.eos_ids = handle.eos_ids.data();
  info.eos_count = handle.eos_ids.size();
  info.tokenizer_problem = model.tokenizer_problem();
  return info;
}

std::optional<bool> bos_choice(int add_bos) {
  if (add_bos < -1 || add_bos > 1)
    fail(EDGELM_INVALID_ARGUMENT, "add_bos is ", add_bos, ": give 1, 0, or -1 for the tokenizer's default");
  return add_bos == -1 ? std::nullopt : std::optional<bool>(add_bos == 1);
}

void check_ids(const Tokenizer& tokenizer, const std::vector<std::int32_t>& ids) {
  for (const std::int32_t id : ids)
    if (id < 0 || id >= tokenizer.size())
      fail(EDGELM_INVALID_ARGUMENT, "token id ", id, " is outside the vocabulary 0..", tokenizer.size() - 1);
}

}  // namespace

namespace edgelm::capi {

edgelm_error* new_error(edgelm_code code, const char* message) noexcept {
  try {
    return new edgelm_error{code, message};
  } catch (...) {
    return out_of_memory();
  }
}

}  // namespace edgelm::capi

// ---- library ----------------------------------------------------------------------------------------------------------

int edgelm_abi_version(void) { return EDGELM_ABI_VERSION; }
const char* edgelm_version(void) { return EDGELM_VERSION; }

edgelm_code edgelm_error_code(const edgelm_error* error) { return error == nullptr ? EDGELM_OK : error->code; }
const char* edgelm_error_message(const edgelm_error* error) { return error == nullptr ? "" : error->message.c_str(); }
void edgelm_error_free(edgelm_error* error) {
  if (error != out_of_memory()) delete error;
}
void edgelm_free(void* memory) { std::free(memory); }

// ---- models -----------------------------------------------------------------------------------------------------------

edgelm_error* edgelm_open(const char* path, const edgelm_open_options* options, edgelm_model** model) {
  return guarded([&] {
    require_given(path, "path");
    require_given(model, "model");
    const edgelm_open_options given = options_at(options, "edgelm_open_options");
    RuntimeOptions wanted;
    wanted.runtime = or_empty(given.runtime);
    wanted.onnxruntime = or_empty(given.onnxruntime);
    wanted.threads = int(count_of(given.threads, "threads"));
    wanted.context_length = count_of(given.context_length, "context_length");
    wanted.chunk = count_of(given.chunk, "chunk");
    wanted.kv = or_empty(given.kv);
    auto handle = std::make_unique<edgelm_model>();
    handle->model = std::make_shared<Model>(path, wanted);
    for (const std::int64_t id : handle->model->bundle().manifest().eos_ids)
      handle->eos_ids.push_back(std::int32_t(id));
    *model = handle.release();
  });
}

void edgelm_close(edgelm_model* model) {
  if (model == nullptr) return;
  edgelm_error_free(guarded([&] { model->model->close(); }));
  edgelm_error_free(guarded([&] { delete model; }));
}

edgelm_error* edgelm_get_info(const edgelm_model* model, edgelm_model_info* info) {
  return guarded([&] {
    require_given(model, "model");
    fill_in(info, "edgelm_model_info", info_of(*model));
  });
}

// ---- text and tokens --------------------------------------------------------------------------------------------------

edgelm_error* edgelm_tokenize(const edgelm_model* model, const char* text, size_t size, int add_bos, int32_t** ids,
                              size_t* count) {
  return guarded([&] {
    const auto tokenizer = held(model)->tokenizer();
    require_given(ids, "ids");
    require_given(count, "count");
    const std::vector<TokenId> found = tokenizer->encode(text_at(text, size, "text"), bos_choice(add_bos));
    auto* copy = static_cast<std::int32_t*>(allocated(found.size() * sizeof(std::int32_t)));
    std::copy(found.begin(), found.end(), copy);
    *ids = copy;
    *count = found.size();
  });
}

edgelm_error* edgelm_detokenize(const edgelm_model* model, const int32_t* ids, size_t count, int skip_special,
                                char** text, size_t* size) {
  return guarded([&] {
    const auto tokenizer = held(model)->tokenizer();
    require_given(text, "text");
    require_given(size, "size");
    const std::vector<TokenId> given = ids_at(ids, count);
    check_ids(*tokenizer, given);
    return_text(tokenizer->decode(given, skip_special != 0), text, size);
  });
}

edgelm_error* edgelm_detokenizer_new(const edgelm_model* model, int skip_special, edgelm_detokenizer** detokenizer) {
  return guarded([&] {
    auto tokenizer = held(model)->tokenizer();
    require_given(detokenizer, "detokenizer");
    Detokenizer stream(*tokenizer, skip_special != 0);
    *detokenizer = new edgelm_detokenizer{std::move(tokenizer), std::move(stream), {}};
  });
}

edgelm_error* edgelm_detokenizer_push(edgelm_detokenizer* detokenizer, int32_t id, const char** text, size_t* size) {
  return guarded([&] {
    require_given(detokenizer, "detokenizer");
    require_given(text, "text");
    require_given(size, "size");
    check_ids(*detokenizer->tokenizer, {id});
    detokenizer->text = detokenizer->stream.push(id);
    *text = detokenizer->text.c_str();
    *size = detokenizer->text.size();
  });
}

edgelm_error* edgelm_detokenizer_flush(edgelm_detokenizer* detokenizer, const char** text, size_t* size) {
  return guarded([&] {
    require_given(detokenizer, "detokenizer");
    require_given(text, "text");
    require_given(size, "size");
    detokenizer->text = detokenizer->stream.flush();
    *text = detokenizer->text.c_str();
    *size = detokenizer->text.size();
  });
}

void edgelm_detokenizer_free(edgelm_detokenizer* detokenizer) { delete detokenizer; }

edgelm_error* edgelm_render_chat(const edgelm_model* model, const char* messages, size_t messages_size,
                                 const char* variables, size_t variables_size, int add_generation_prompt, char** text,
                                 size_t* size) {
  return guarded([&] {
    const auto opened = held(model);
    require_given(text, "text");
    require_given(size, "size");
    const auto parsed = [](std::string_view json, const char* name) {
      return Json::parse(json, name, EDGELM_INVALID_ARGUMENT);
    };
    const Json extra = variables == nullptr ? Json()
                                            : parsed(text_at(variables, variables_size, "variables"), "variables");
    const Json conversation = parsed(text_at(messages, messages_size, "messages"), "messages");
    return_text(opened->render_chat(conversation, extra, add_generation_prompt != 0), text, size);
  });
}
