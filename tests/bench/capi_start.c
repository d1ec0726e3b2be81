/* Open a bundle, generate, and print seconds, tokens and memory as one JSON line: for capi_start.py.
 *
 *     capi_start BUNDLE ONNXRUNTIME TOKENS PROMPT
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "edgelm.h"

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void check(edgelm_error* error) {
  if (error == NULL) return;
  fprintf(stderr, "%s\n", edgelm_error_message(error));
  exit(1);
}

/* A line of /proc/self/status in bytes. */
static long memory(const char* name) {
  char line[256];
  long found = -1;
  FILE* status = fopen("/proc/self/status", "r");
  while (status != NULL && fgets(line, sizeof line, status) != NULL) {
    if (strncmp(line, name, strlen(name)) == 0) found = 1024 * atol(line + strlen(name));
  }
  if (status != NULL) fclose(status);
  return found;
}

int main(int count, char** arguments) {
  const double start = now();
  if (count != 5) return 2;
  edgelm_open_options open = EDGELM_INIT(edgelm_open_options);
  open.onnxruntime = arguments[2];
  edgelm_model* model;
  check(edgelm_open(arguments[1], &open, &model));
  const double opened = now();
  edgelm_generate_options options = EDGELM_INIT(edgelm_generate_options);
  options.max_tokens = atoi(arguments[3]);
  edgelm_generation* generation;
  check(edgelm_generate_text(model, arguments[4], strlen(arguments[4]), &options, &generation));
  edgelm_timings timings = EDGELM_INIT(edgelm_timings);
  check(edgelm_generation_timings(generation, &timings));
  const double first = opened + timings.time_to_first_token;
  printf("{\"opened\": %f, \"first\": %f, \"clock\": %f, ", opened - start, first - start, first);
  printf("\"prompt\": %ld, \"prefill\": %f, \"decoded\": %ld, \"decode\": %f, ", (long)timings.prompt_tokens,
         timings.prefill_seconds, (long)timings.decoded_tokens, timings.decode_seconds);
  printf("\"anonymous\": %ld, \"file\": %ld, \"tokens\": [", memory("RssAnon:"), memory("RssFile:"));
  size_t tokens;
  const int32_t* ids = edgelm_generation_tokens(generation, &tokens);
  for (size_t i = 0; i < tokens; ++i) printf(i == 0 ? "%d" : ", %d", ids[i]);
  printf("]}\n");
  edgelm_generation_free(generation);
  edgelm_close(model);
  return 0;
}
