/* edgelm-parity: check that this device computes the same model as the reference, without Python.
 *
 *   edgelm-parity BUNDLE [--json FILE] [--threads N] [--kv TYPE] [--onnxruntime FILE]
 *
 * Prints the summary of `edgelm parity`. Exit code 0: passed, 1: failed, 2: wrong usage. */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "capi/edgelm.h"
#include "capi/programs/json_reader.h"
#include "capi/programs/parity_summary.h"

#ifdef _WIN32
#include <io.h>
#include <windows.h>
#include <shellapi.h>
#else
#include <unistd.h>
#endif

static const char kUsage[] =
    "usage: edgelm-parity BUNDLE [--json FILE] [--threads N] [--kv TYPE] [--onnxruntime FILE]\n"
    "\n"
    "Check that this device computes the same model as the reference: run the prompts stored in BUNDLE and compare\n"
    "logits, tokens and expert choices with those of the PyTorch reference. Exit code 1 if a check fails.\n"
    "\n"
    "  --json FILE         also write the report of `edgelm parity --json`\n"
    "  --threads N         CPU threads [default: the physical cores that this process may use]\n"
    "  --kv TYPE           type of the KV cache: float32, float16, bfloat16, fp8, int8 [default: as exported]\n"
    "  --onnxruntime FILE  the ONNX Runtime library [default: EDGELM_ONNXRUNTIME, else beside libedgelm, else the\n"
    "                      system's]\n"
    "  --version           print the version\n";

enum { kPassed = 0, kFailed = 1, kWrongUsage = 2 };

typedef struct arguments {
  const char* bundle;
  const char* json;
  edgelm_parity_options options;
} arguments;

static int usage_error(const char* what, const char* which) {
  fprintf(stderr, "%sedgelm-parity: error: %s %s\n", kUsage, what, which);
  return kWrongUsage;
}

static int failure(const char* what, const char* which) {
  fprintf(stderr, "edgelm-parity: error: %s%s\n", what, which);
  return kFailed;
}

/* Read the arguments. Returns -1, or the exit code where there is nothing more to do. */
static int read_arguments(int argc, char** argv, arguments* given) {
  for (int i = 1; i < argc; ++i) {
    const char* name = argv[i];
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) return fputs(kUsage, stdout) < 0;
    if (strcmp(name, "--version") == 0) return printf("edgelm-parity %s\n", edgelm_version()) < 0;
    if (name[0] != '-') {
      if (given->bundle != NULL) return usage_error("more than one bundle:", name);
      given->bundle = name;
      continue;
    }
    const int known = strcmp(name, "--json") == 0 || strcmp(name, "--threads") == 0 || strcmp(name, "--kv") == 0 ||
                      strcmp(name, "--onnxruntime") == 0;
    if (!known) return usage_error("no such option:", name);
    if (++i == argc) return usage_error("a value is missing after", name);
    if (strcmp(name, "--json") == 0) {
      given->json = argv[i];
    } else if (strcmp(name, "--kv") == 0) {
      given->options.kv = argv[i];
    } else if (strcmp(name, "--onnxruntime") == 0) {
      given->options.onnxruntime = argv[i];
    } else {
      char* end = NULL;
      errno = 0;
      const long threads = strtol(argv[i], &end, 10);
      if (errno != 0 || *end != 0 || end == argv[i] || threads < 1 || threads > 4096)
        return usage_error("--threads takes a number of CPU threads, not", argv[i]);
      given->options.threads = (int32_t)threads;
    }
  }
  return given->bundle == NULL ? usage_error("give the folder of a bundle:", "BUNDLE is missing") : -1;
}

static int on_progress(void* user, const char* what, int64_t done, int64_t total) {
  (void)user;
  fprintf(stderr, "\r%s %3d %% ", what, total > 0 ? (int)(100 * done / total) : 100); /* each time over the last one */
  if (done >= total) fputc('\n', stderr);
  return 0;
}

/* fopen for a path in UTF-8. */
static FILE* open_for_writing(const char* path) {
#ifdef _WIN32
  wchar_t wide[4096];
  if (MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, 4096) == 0) return NULL;
  return _wfopen(wide, L"wb");
#else
  return fopen(path, "wb");
#endif
}

static int write_report(const char* path, const char* report, size_t size) {
  FILE* file = open_for_writing(path);
  if (file == NULL) return failure("cannot write ", path);
  int wrong = fwrite(report, 1, size, file) != size || fputc('\n', file) == EOF;
  wrong |= fclose(file) != 0;
  return wrong ? failure("cannot write ", path) : kPassed;
}

static int check(const arguments* given) {
  int passed = 0;
  char* report = NULL;
  size_t size = 0;
  edgelm_error* error = edgelm_parity(given->bundle, &given->options, &passed, &report, &size);
  if (error != NULL) {
    const int status = edgelm_error_code(error) == EDGELM_INVALID_ARGUMENT ? kWrongUsage : kFailed;
    failure(edgelm_error_message(error), "");
    edgelm_error_free(error);
    return status;
  }
  int status = given->json == NULL ? kPassed : write_report(given->json, report, size);
  json* document = json_parse(report);
  if (document != NULL) print_parity_summary(stdout, document);
  else status = failure("not enough memory for the summary", "");
  json_free(document);
  edgelm_free(report);
  if (fflush(stdout) != 0) status = failure("cannot write the summary", "");
  return passed ? status : kFailed;
}

#ifdef _WIN32
/* The arguments in UTF-8: those of main are in the code page, which lacks most characters. */
static int utf8_arguments(int* argc, char*** argv) {
  int count = 0;
  wchar_t** wide = CommandLineToArgvW(GetCommandLineW(), &count);
  char** found = wide == NULL ? NULL : calloc((size_t)count + 1, sizeof(char*));
  if (found == NULL) return 0;
  for (int i = 0; i < count; ++i) {
    const int size = WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, NULL, 0, NULL, NULL);
    if ((found[i] = malloc((size_t)size + 1)) == NULL) return 0;
    WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, found[i], size, NULL, NULL);
  }
  LocalFree(wide);
  *argc = count;
  *argv = found;
  SetConsoleOutputCP(CP_UTF8);
  return 1;
}
#endif

int main(int argc, char** argv) {
#ifdef _WIN32
  if (!utf8_arguments(&argc, &argv)) return failure("not enough memory", "");
  const int terminal = _isatty(_fileno(stderr));
#else
  const int terminal = isatty(STDERR_FILENO);
#endif
  arguments given = {NULL, NULL, EDGELM_INIT(edgelm_parity_options)};
  if (terminal) given.options.on_progress = on_progress;
  const int status = read_arguments(argc, argv, &given);
  return status >= 0 ? status : check(&given);
}
