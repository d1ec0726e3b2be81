#include "capi/programs/parity_summary.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { kMostNamed = 3 }; /* failed checks that one line names */

/* Lines of the summary, with the beginnings of the checks' names that each stands for. */
static const struct {
  const char* name;
  const char* beginnings[5];
} kGroups[] = {
    {"files", {"integrity"}},
    {"tokenizer", {"tokenizer"}},
    {"logits", {"logits", "perplexity"}},
    {"decoding", {"greedy"}},
    {"layers", {"embedding", "layer", "experts", "head"}},
};
enum { kGroupCount = sizeof(kGroups) / sizeof(kGroups[0]) };

static const char* const kShort[][2] = {
    {"logits.kl_mean", "mean KL, nats"},
    {"logits.kl_p99", "99th percentile of the KL, nats"},
    {"logits.kl_max", "largest KL, nats"},
    {"logits.error", "error of the log-probabilities, median"},
    {"logits.error_p90", "error of the log-probabilities, 90th percentile"},
    {"logits.top1", "share of clear positions with the same most probable token"},
    {"perplexity.device", "change of the perplexity"},
    {"greedy.tokens", "clear choices that differ"},
    {"greedy.error", "error of the log-probabilities, median"},
    {"greedy.kl", "largest KL, nats"},
    {"embedding", "error of the embedding"},
    {"head", "error of the log-probabilities after the last layer"},
};

static int is(const json* value, json_type type) { return value->type == type; }
static const char* text_of(const json* value, const char* key) { return json_get(value, key)->string; }
static double number_of(const json* value, const char* key) { return json_get(value, key)->number; }
static int did_fail(const json* check) { return is(json_get(check, "passed"), JSON_FALSE); }

/* Print a text of the report. Names in it come from the bundle: what could steer a terminal becomes '?'. */
static void print_text(FILE* file, const char* text) {
  for (; *text != 0; ++text) {
    const unsigned char byte = (unsigned char)*text, next = (unsigned char)text[1];
    const int c1 = byte == 0xC2 && next >= 0x80 && next < 0xA0;
    fputc(byte < 32 || byte == 127 || c1 ? '?' : byte, file);
    if (c1) ++text;
  }
}

/* 61,160 and 271.4: with thousands separators, and a decimal below a thousand. */
static void print_rate(FILE* file, double value) {
  char digits[64];
  const int size = snprintf(digits, sizeof(digits), "%.*f", fabs(value) >= 1000 ? 0 : 1, value);
  const int whole = (int)strcspn(digits, ".");
  for (int i = 0; i < size; ++i) {
    fputc(digits[i], file);
    if (i + 1 < whole && (whole - i - 1) % 3 == 0 && digits[i] != '-') fputc(',', file);
  }
}

static int has_beginning(const char* name, const char* beginning) {
  const size_t size = strcspn(name, ".[");
  return strlen(beginning) == size && strncmp(name, beginning, size) == 0;
}

static int group_of(const char* name) {
  for (int group = 0; group < kGroupCount; ++group)
    for (const char* const* one = kGroups[group].beginnings; *one != NULL; ++one)
      if (has_beginning(name, *one)) return group;
  return -1;
}

static const json* check_named(const json* checks, const char* name) {
  for (const json* check = checks->child; check != NULL; check = check->next)
    if (strcmp(text_of(check, "name"), name) == 0) return check;
  return NULL;
}

/* ---- the first sentence ------------------------------------------------------------------------------------------ */

static void print_passed(FILE* file, const json* checks) {
  fputs("This device computes the same model as the reference", file);
  const json* kl = check_named(checks, "logits.kl_mean");
  if (kl != NULL && is(json_get(kl, "value"), JSON_NUMBER) && is(json_get(kl, "limit"), JSON_NUMBER))
    fprintf(file, ": mean KL %.2g nats, limit %.2g", number_of(kl, "value"), number_of(kl, "limit"));
  fputs(".\n", file);
}

static void print_sentence(FILE* file, const json* report) {
  const json* checks = json_get(report, "checks");
  int failed = 0, files = 0, tokenizer = 0;
  for (const json* check = checks->child; check != NULL; check = check->next) {
    if (!did_fail(check)) continue;
    ++failed;
    files += has_beginning(text_of(check, "name"), "integrity");
    tokenizer += has_beginning(text_of(check, "name"), "tokenizer");
  }
  if (failed == 0) {
    print_passed(file, checks);
  } else if (failed == files) {
    fputs("The bundle's files are damaged, though this device still computes the same model as the reference.\n", file);
  } else if (failed == files + tokenizer) {
    fputs("The bundle's tokenizer is not the one that was exported.\n", file);
  } else {
    const char* stored = text_of(report, "cause");
    char* cause = malloc(strlen(stored) + 1);
    if (cause == NULL) return;
    strcpy(cause, stored);
    char* evidence = strstr(cause, ": "); /* "PLACE: EVIDENCE" */
    if (evidence != NULL) {
      *evidence = 0;
      evidence += 2;
      if (*evidence >= 'a' && *evidence <= 'z') *evidence += 'A' - 'a';
    }
    fputs("This device does NOT compute the same model as the reference: ", file);
    if (*cause != 0) {
      fputs("it first differs in ", file);
      print_text(file, cause);
    } else {
      fprintf(file, "%d checks failed", failed);
    }
    fputs(".\n", file);
    if (evidence != NULL && *evidence != 0) {
      print_text(file, evidence);
      fputs(".\n", file);
    }
    free(cause);
  }
}

/* ---- groups of checks -------------------------------------------------------------------------------------------- */

static void print_failure(FILE* file, const json* check, const json* report) {
  const char *name = text_of(check, "name"), *detail = text_of(check, "detail"), *title = text_of(check, "title");
  for (size_t i = 0; i < sizeof(kShort) / sizeof(kShort[0]); ++i)
    if (strcmp(name, kShort[i][0]) == 0) title = kShort[i][1];
  const double value = number_of(check, "value"), limit = number_of(check, "limit");
  const double layer = number_of(check, "layer"), positions = number_of(report, "positions");
  if (isnan(value) || isnan(limit)) {
    print_text(file, *detail != 0 ? detail : title);
    if (*detail == 0) fputs(": not a number", file);
  } else if (has_beginning(name, "layer")) {
    fprintf(file, "layer %.0f adds an error of its own at %.0f of %.0f positions", layer, value, positions);
  } else if (has_beginning(name, "experts")) {
    fprintf(file, "layer %.0f chooses other experts at %.0f of %.0f positions", layer, value, positions);
  } else {
    print_text(file, title);
    fprintf(file, ": %.3g, limit %.3g", value, limit);
  }
}

static void print_success(FILE* file, int group, const json* report, const json* first) {
  const char* name = kGroups[group].name;
  const json* layers = json_get(json_get(report, "diagnosis"), "layers");
  if (strcmp(name, "tokenizer") == 0) {
    fputs("same token ids, same text, same vocabulary", file);
  } else if (strcmp(name, "logits") == 0) {
    const double clear = number_of(report, "top1_clear");
    fprintf(file, "mean KL %.2g nats; most probable token the same at %.4g %% of positions",
            number_of(report, "kl_mean"), 100 * number_of(report, "top1"));
    if (!isnan(clear)) fprintf(file, ", %.4g %% of the clear ones", 100 * clear);
  } else if (strcmp(name, "decoding") == 0) {
    const json* tokens = check_named(json_get(report, "checks"), "greedy.tokens");
    const double different = tokens == NULL ? 0 : number_of(tokens, "value");
    fprintf(file, "%.0f greedy tokens through the KV cache: ", number_of(report, "greedy_total"));
    if (different > 0) fprintf(file, "%.0f clear choices differ", different);
    else fputs("every clear choice is the same", file);
  } else if (strcmp(name, "layers") == 0 && is(layers, JSON_ARRAY)) {
    int count = 0;
    for (const json* layer = layers->child; layer != NULL; layer = layer->next) ++count;
    fprintf(file, "the embedding and all %d layers agree", count);
  } else {
    print_text(file, text_of(first, "detail"));
  }
}

/* Print the line of a group if it failed or not, as asked. */
static void print_group(FILE* file, int group, const json* report, int failures) {
  const json *first = NULL, *first_failed = NULL;
  int failed = 0, passed = 0;
  for (const json* check = json_get(report, "checks")->child; check != NULL; check = check->next) {
    if (group_of(text_of(check, "name")) != group) continue;
    if (first == NULL) first = check;
    if (did_fail(check) && failed++ == 0) first_failed = check;
    passed += is(json_get(check, "passed"), JSON_TRUE);
  }
  if (first == NULL || (failed > 0) != failures) return;
  fprintf(file, "%-4s  %-12s  ", failed > 0 ? "FAIL" : passed > 0 ? "ok" : "", kGroups[group].name);
  int named = 0;
  for (const json* check = first_failed; check != NULL && named < kMostNamed; check = check->next) {
    if (!did_fail(check) || group_of(text_of(check, "name")) != group) continue;
    if (named++ > 0) fputs("; ", file);
    print_failure(file, check, report);
  }
  if (failed > kMostNamed) fprintf(file, "; %d more", failed - kMostNamed);
  if (failed == 0 && passed > 0) print_success(file, group, report, first);
  if (failed == 0 && passed == 0) print_text(file, text_of(first, "detail"));
  fputc('\n', file);
}

/* ---- what is no check -------------------------------------------------------------------------------------------- */

static void print_quantisation(FILE* file, const json* loss) {
  fprintf(file, "%-4s  %-12s  cost: ", "", "quantisation");
  if (!is(json_get(loss, "known"), JSON_TRUE)) {
    fputs("not known: the checkpoint was quantised already and the export had no --reference\n", file);
    return;
  }
  fprintf(file, "mean KL %.3g nats (recipe alone %.3g)", number_of(loss, "kl"), number_of(loss, "kl_reference"));
  const double recipe = number_of(loss, "perplexity_reference");
  if (!isnan(recipe))
    fprintf(file, ", perplexity %+.2g %% (recipe alone %+.2g %%)", 100 * number_of(loss, "perplexity"), 100 * recipe);
  fputc('\n', file);
}

static void print_speed(FILE* file, const json* report) {
  const json* speed = json_get(report, "speed");
  if (!is(speed, JSON_OBJECT)) return;
  fprintf(file, "%-4s  %-12s  prefill ", "", "speed");
  print_rate(file, number_of(speed, "prefill_tokens_per_s"));
  fputs(", decode ", file);
  print_rate(file, number_of(speed, "decode_tokens_per_s"));
  fputs(" tokens/s (", file);
  print_text(file, text_of(report, "runtime"));
  fprintf(file, ", %.0f threads)\n", number_of(report, "threads"));
}

void print_parity_summary(FILE* file, const json* report) {
  print_sentence(file, report);
  fputc('\n', file);
  /* What failed stands first, next to the sentence. */
  for (int failures = 1; failures >= 0; --failures)
    for (int group = 0; group < kGroupCount; ++group) print_group(file, group, report, failures);
  const json* loss = json_get(report, "float_loss");
  print_quantisation(file, loss);
  print_speed(file, report);
  fputc('\n', file);
  if (is(json_get(loss, "warning"), JSON_STRING)) {
    fputs("warning: ", file);
    print_text(file, text_of(loss, "warning"));
    fputc('\n', file);
  }
  for (const json* note = json_get(report, "notes")->child; note != NULL; note = note->next) {
    fputs("note: ", file);
    print_text(file, note->string);
    fputc('\n', file);
  }
  int total = 0, failed = 0;
  for (const json* check = json_get(report, "checks")->child; check != NULL; check = check->next) {
    total += !is(json_get(check, "passed"), JSON_NULL);
    failed += did_fail(check);
  }
  if (failed > 0) fprintf(file, "%d of %d checks FAILED", failed, total);
  else fprintf(file, "all %d checks passed", total);
  fputs(", with the limits for ", file);
  print_text(file, text_of(report, "kind"));
  fputc('\n', file);
}
