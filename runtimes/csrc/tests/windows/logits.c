/* Prints the checksum of a bundle's logits, and the text that it generates: the same on every system.
 *
 *   logits BUNDLE PROMPT */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "capi/edgelm.h"

static int failed(edgelm_error* error) {
  if (error == NULL) return 0;
  fprintf(stderr, "error %d: %s\n", (int)edgelm_error_code(error), edgelm_error_message(error));
  edgelm_error_free(error);
  return 1;
}

/* FNV-1a. */
static uint64_t checksum(const void* data, size_t bytes) {
  uint64_t sum = 14695981039346656037u;
  for (size_t i = 0; i < bytes; ++i) sum = (sum ^ ((const unsigned char*)data)[i]) * 1099511628211u;
  return sum;
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  edgelm_model* model = NULL;
  edgelm_open_options open = EDGELM_INIT(edgelm_open_options);
  open.threads = 1; /* ONNX Runtime's operators may add in another order with more */
  if (failed(edgelm_open(argv[1], &open, &model))) return 1;
  edgelm_model_info info = EDGELM_INIT(edgelm_model_info);
  int32_t* ids = NULL;
  size_t count = 0;
  if (failed(edgelm_get_info(model, &info)) ||
      failed(edgelm_tokenize(model, argv[2], strlen(argv[2]), -1, &ids, &count)))
    return 1;
  const size_t floats = count * (size_t)info.vocab_size;
  float* logits = malloc(floats * sizeof(float));
  if (logits == NULL || failed(edgelm_logits(model, ids, count, count, logits, floats))) return 1;
  printf("%s %s: logits %016llx of %d tokens\n", info.recipe, info.operators,
         (unsigned long long)checksum(logits, floats * sizeof(float)), (int)count);
  edgelm_generate_options options = EDGELM_INIT(edgelm_generate_options);
  options.max_tokens = 24;
  edgelm_generation* generation = NULL;
  if (failed(edgelm_generate_text(model, argv[2], strlen(argv[2]), &options, &generation))) return 1;
  size_t size = 0, number = 0;
  const char* text = edgelm_generation_text(generation, &size);
  const int32_t* tokens = edgelm_generation_tokens(generation, &number);
  printf("text %016llx, tokens", (unsigned long long)checksum(text, size));
  for (size_t i = 0; i < number; ++i) printf(" %d", (int)tokens[i]);
  printf("\n");
  edgelm_generation_free(generation);
  edgelm_free(ids);
  free(logits);
  edgelm_close(model);
  return 0;
}
