/* What a C program does with a bundle: tokenise, stream a text, stop it at a string, and check parity.
 *
 *   tour BUNDLE PROMPT [STOP...]    prints tokens and text; with STOP strings, the text ends before the first of them
 *   tour --parity BUNDLE            prints the report of the parity check as JSON; exits with 1 if the check failed
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include <edgelm/edgelm.h>

/* Print an error and free it. Every function returns one or NULL, and what it has made is valid only after NULL. */
static int failed(edgelm_error* error) {
  if (error == NULL) return 0;
  fprintf(stderr, "error %d: %s\n", (int)edgelm_error_code(error), edgelm_error_message(error));
  edgelm_error_free(error);
  return 1;
}

static int print_tokens(const edgelm_model* model, const char* prompt) {
  int32_t* ids = NULL;
  size_t count = 0;
  if (failed(edgelm_tokenize(model, prompt, strlen(prompt), -1, &ids, &count))) return 1;
  printf("prompt:");
  for (size_t i = 0; i < count; ++i) printf(" %" PRId32, ids[i]);
  printf("\n");
  edgelm_free(ids);
  return 0;
}

/* Called with each part of the text as it is generated. */
static int on_text(void* user, const char* text, size_t size) {
  FILE* file = user;
  return fwrite(text, 1, size, file) == size && fflush(file) == 0 ? 0 : 1; /* not 0: stop, nobody reads it */
}

static int print_text(edgelm_model* model, const char* prompt, char** stop, size_t stop_count) {
  edgelm_generate_options options = EDGELM_INIT(edgelm_generate_options);
  options.max_tokens = 24;
  options.stop = (const char* const*)stop;
  options.stop_count = stop_count;
  options.on_text = on_text;
  options.user = stdout;
  edgelm_generation* generation = NULL;
  printf("text: ");
  if (failed(edgelm_generate_text(model, prompt, strlen(prompt), &options, &generation))) return 1;
  static const char* const reasons[] = {"the model ended it", "a stop string", "the limit of tokens", "interrupted"};
  size_t count = 0;
  const int32_t* tokens = edgelm_generation_tokens(generation, &count);
  printf("\ntokens:");
  for (size_t i = 0; i < count; ++i) printf(" %" PRId32, tokens[i]);
  printf("\nends: %s\n", reasons[edgelm_generation_reason(generation)]);
  edgelm_generation_free(generation);
  return 0;
}

static int generate(const char* path, const char* prompt, char** stop, size_t stop_count) {
  edgelm_model* model = NULL;
  if (failed(edgelm_open(path, NULL, &model))) return 1;
  const int status = print_tokens(model, prompt) || print_text(model, prompt, stop, stop_count);
  edgelm_close(model);
  return status;
}

static int on_progress(void* user, const char* what, int64_t done, int64_t total) {
  (void)user;
  fprintf(stderr, "\r%s %3d %% ", what, total > 0 ? (int)(100 * done / total) : 100); /* each time over the last one */
  if (done >= total) fprintf(stderr, "\n");
  return 0;
}

static int check_parity(const char* path) {
  edgelm_parity_options options = EDGELM_INIT(edgelm_parity_options);
  options.on_progress = on_progress;
  int passed = 0;
  char* report = NULL;
  size_t size = 0;
  if (failed(edgelm_parity(path, &options, &passed, &report, &size))) return 2;
  printf("%s\n", report);
  edgelm_free(report);
  return passed ? 0 : 1;
}

int main(int argc, char** argv) {
  if (argc == 3 && strcmp(argv[1], "--parity") == 0) return check_parity(argv[2]);
  if (argc >= 3) return generate(argv[1], argv[2], argv + 3, (size_t)(argc - 3));
  fprintf(stderr, "usage: tour BUNDLE PROMPT [STOP...]\n       tour --parity BUNDLE\n");
  return 2;
}
