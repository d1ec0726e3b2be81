/* Uses every function of edgelm.h, as C11 and as C++. Arguments: bundle, ONNX Runtime library, folder for a file. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgelm.h"

static void must(edgelm_error* error) {
  if (error == NULL) return;
  fprintf(stderr, "error %d: %s\n", (int)edgelm_error_code(error), edgelm_error_message(error));
  edgelm_error_free(error);
  exit(1);
}

static void expect(int condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "failed: %s\n", what);
  exit(1);
}

static int collect(void* user, const char* text, size_t size) {
  char* all = (char*)user;
  strncat(all, text, size);
  return 0;
}

static int on_progress(void* user, const char* what, int64_t done, int64_t total) {
  (void)what;
  expect(done <= total, "progress");
  ++*(int*)user;
  return 0;
}

static void texts(edgelm_model* model) {
  int32_t* ids = NULL;
  size_t count = 0, size = 0, joined = 0;
  char* text = NULL;
  must(edgelm_tokenize(model, "import os", 9, -1, &ids, &count));
  expect(count > 0, "tokens");
  must(edgelm_detokenize(model, ids, count, 1, &text, &size));
  expect(size == 9 && strcmp(text, "import os") == 0, "text of the tokens");

  edgelm_detokenizer* detokenizer = NULL;
  const char* part = NULL;
  size_t part_size = 0;
  must(edgelm_detokenizer_new(model, 1, &detokenizer));
  for (size_t i = 0; i < count; ++i) {
    must(edgelm_detokenizer_push(detokenizer, ids[i], &part, &part_size));
    expect(memcmp(text + joined, part, part_size) == 0, "streamed text");
    joined += part_size;
  }
  must(edgelm_detokenizer_flush(detokenizer, &part, &part_size));
  expect(joined + part_size == size, "end of the streamed text");
  edgelm_detokenizer_free(detokenizer);
  edgelm_free(text);
  edgelm_free(ids);
}

static void chats(edgelm_model* model) {
  const char* messages = "[{\"role\": \"user\", \"content\": \"Hello\"}]";
  char* prompt = NULL;
  size_t size = 0;
  must(edgelm_render_chat(model, messages, strlen(messages), "{}", 2, 1, &prompt, &size));
  expect(strstr(prompt, "Hello") != NULL && strlen(prompt) == size, "prompt");
  edgelm_free(prompt);
  edgelm_generate_options options = EDGELM_INIT(edgelm_generate_options);
  options.max_tokens = 4;
  edgelm_generation* answer = NULL;
  must(edgelm_chat(model, messages, strlen(messages), &options, &answer));
  edgelm_generation_free(answer);
}

static void generates(edgelm_model* model) {
  char streamed[4096] = "";
  const char* const stop[] = {"@nowhere@"};
  const uint64_t seed = 1;
  edgelm_generate_options options = EDGELM_INIT(edgelm_generate_options);
  options.max_tokens = 16;
  options.temperature = 0.8;
  options.top_p = 0.95;
  options.seed = &seed;
  options.stop = stop;
  options.stop_count = 1;
  options.on_text = collect;
  options.user = streamed;
  edgelm_generation *first = NULL, *second = NULL;
  must(edgelm_generate_text(model, "import os", 9, &options, &first));
  size_t size = 0, count = 0;
  const char* text = edgelm_generation_text(first, &size);
  expect(strcmp(text, streamed) == 0 && strlen(text) == size, "streamed text of a generation");
  expect(edgelm_generation_tokens(first, &count) != NULL && count == 16, "tokens of a generation");
  expect(edgelm_generation_reason(first) == EDGELM_STOP_LENGTH, "reason");
  edgelm_timings timings = EDGELM_INIT(edgelm_timings);
  must(edgelm_generation_timings(first, &timings));
  expect(timings.decoded_tokens == 15 && timings.decode_seconds > 0, "timings");

  const int32_t ids[] = {5, 6, 7};
  must(edgelm_generate(model, ids, 3, NULL, &second));
  edgelm_generation_free(second);
  edgelm_generation_free(first);
}

static void computes(edgelm_model* model, size_t vocab_size, const char* folder) {
  const int32_t ids[] = {5, 6, 7};
  float* logits = (float*)malloc(3 * vocab_size * sizeof(float));
  must(edgelm_logits(model, ids, 3, 3, logits, 3 * vocab_size));
  free(logits);
  int64_t cached = 0;
  must(edgelm_cached_tokens(model, &cached));
  expect(cached == 3, "cached tokens");
  char path[4096];
  snprintf(path, sizeof path, "%s/session", folder);
  must(edgelm_save_session(model, path));
  must(edgelm_reset(model));
  must(edgelm_load_session(model, path));
  must(edgelm_cached_tokens(model, &cached));
  expect(cached == 3, "cached tokens of a session");
  edgelm_cancel(model);
}

int main(int argc, char** argv) {
  expect(argc == 4, "arguments");
  expect(edgelm_abi_version() == EDGELM_ABI_VERSION && strlen(edgelm_version()) > 0, "version");
  edgelm_open_options options = EDGELM_INIT(edgelm_open_options);
  options.onnxruntime = argv[2];
  options.threads = 2;
  edgelm_model* model = NULL;
  edgelm_error* error = edgelm_open("/nowhere", &options, &model);
  expect(edgelm_error_code(error) == EDGELM_BUNDLE && model == NULL, "a bundle that is not there");
  edgelm_error_free(error);
  must(edgelm_open(argv[1], &options, &model));
  edgelm_model_info info = EDGELM_INIT(edgelm_model_info);
  must(edgelm_get_info(model, &info));
  printf("%s: %d layers\n", info.name, (int)info.num_layers);
  texts(model);
  chats(model);
  generates(model);
  computes(model, (size_t)info.vocab_size, argv[3]);
  edgelm_close(model);

  int steps = 0, passed = 0;
  char* report = NULL;
  size_t size = 0;
  edgelm_parity_options checked = EDGELM_INIT(edgelm_parity_options);
  checked.onnxruntime = argv[2];
  checked.on_progress = on_progress;
  checked.user = &steps;
  must(edgelm_parity(argv[1], &checked, &passed, &report, &size));
  expect(passed && steps > 0 && strlen(report) == size, "parity");
  edgelm_free(report);
  puts("all functions work");
  return 0;
}
