#include "capi/programs/json_reader.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { kDeepest = 100 };

typedef struct reader {
  char* at;
  int depth;
} reader;

static json* read_value(reader* in);

static void skip_space(reader* in) { in->at += strspn(in->at, " \t\r\n"); }

static json* new_value(json_type type) {
  json* value = calloc(1, sizeof(json));
  if (value == NULL) return NULL;
  value->type = type;
  value->number = NAN;
  value->string = "";
  return value;
}

static int read_hex(const char* text) { /* four digits; -1: they are none */
  int code = 0;
  for (int i = 0; i < 4; ++i) {
    const char digit = text[i];
    if (digit >= '0' && digit <= '9') code = code * 16 + (digit - '0');
    else if ((digit | 32) >= 'a' && (digit | 32) <= 'f') code = code * 16 + ((digit | 32) - 'a' + 10);
    else return -1;
  }
  return code;
}

static char* write_utf8(char* out, unsigned code) {
  if (code < 0x80) {
    *out++ = (char)code;
  } else if (code < 0x800) {
    *out++ = (char)(0xC0 | (code >> 6));
    *out++ = (char)(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    *out++ = (char)(0xE0 | (code >> 12));
    *out++ = (char)(0x80 | ((code >> 6) & 0x3F));
    *out++ = (char)(0x80 | (code & 0x3F));
  } else {
    *out++ = (char)(0xF0 | (code >> 18));
    *out++ = (char)(0x80 | ((code >> 12) & 0x3F));
    *out++ = (char)(0x80 | ((code >> 6) & 0x3F));
    *out++ = (char)(0x80 | (code & 0x3F));
  }
  return out;
}

/* Decode the escape after a backslash at in->at to `*out`, which is never longer. */
static int read_escape(reader* in, char** out) {
  static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
  const char name = *in->at++;
  const char* known = name == 0 ? NULL : strchr(names, name);
  if (known != NULL) {
    *(*out)++ = values[known - names];
    return 1;
  }
  int code = name == 'u' ? read_hex(in->at) : -1;
  if (code < 0) return 0;
  in->at += 4;
  if (code >= 0xD800 && code < 0xDC00 && in->at[0] == '\\' && in->at[1] == 'u') {
    const int low = read_hex(in->at + 2);
    if (low >= 0xDC00 && low < 0xE000) {
      in->at += 6;
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
  }
  if ((code >= 0xD800 && code < 0xE000) || code == 0) code = 0xFFFD;
  *out = write_utf8(*out, (unsigned)code);
  return 1;
}

static const char* read_string(reader* in) {
  if (*in->at != '"') return NULL;
  char* const start = ++in->at;
  char* out = start;
  while (*in->at != '"') {
    if (*in->at == 0) return NULL;
    if (*in->at != '\\') {
      *out++ = *in->at++;
    } else {
      ++in->at;
      if (!read_escape(in, &out)) return NULL;
    }
  }
  ++in->at;
  *out = 0; /* at most the closing quotation mark */
  return start;
}

/* The values of an array or object up to `end`, into value->child. */
static int read_children(reader* in, json* value, char end) {
  json** place = &value->child;
  ++in->at;
  skip_space(in);
  if (*in->at == end) return ++in->at, 1;
  for (;;) {
    const char* key = NULL;
    skip_space(in);
    if (end == '}') {
      key = read_string(in);
      skip_space(in);
      if (key == NULL || *in->at++ != ':') return 0;
    }
    *place = read_value(in);
    if (*place == NULL) return 0;
    (*place)->key = key;
    place = &(*place)->next;
    skip_space(in);
    const char after = *in->at;
    if (after != ',' && after != end) return 0;
    ++in->at;
    if (after == end) return 1;
  }
}

static json* read_word(reader* in, const char* word, json_type type) {
  const size_t size = strlen(word);
  if (strncmp(in->at, word, size) != 0) return NULL;
  in->at += size;
  return new_value(type);
}

static json* read_number(reader* in) {
  if (strchr("-0123456789", *in->at) == NULL || *in->at == 0) return NULL;
  char* end = NULL;
  const double number = strtod(in->at, &end);
  if (end == in->at) return NULL;
  in->at = end;
  json* value = new_value(JSON_NUMBER);
  if (value != NULL) value->number = number;
  return value;
}

static json* read_container(reader* in, json_type type, char end) {
  json* value = in->depth < kDeepest ? new_value(type) : NULL;
  if (value == NULL) return NULL;
  ++in->depth;
  if (!read_children(in, value, end)) {
    json_free(value);
    return NULL;
  }
  --in->depth;
  return value;
}

static json* read_value(reader* in) {
  skip_space(in);
  switch (*in->at) {
    case '{': return read_container(in, JSON_OBJECT, '}');
    case '[': return read_container(in, JSON_ARRAY, ']');
    case '"': {
      const char* string = read_string(in);
      json* value = string == NULL ? NULL : new_value(JSON_STRING);
      if (value != NULL) value->string = string;
      return value;
    }
    case 't': return read_word(in, "true", JSON_TRUE);
    case 'f': return read_word(in, "false", JSON_FALSE);
    case 'n': return read_word(in, "null", JSON_NULL);
    default: return read_number(in);
  }
}

json* json_parse(char* text) {
  reader in = {text, 0};
  json* value = read_value(&in);
  skip_space(&in);
  if (value != NULL && *in.at != 0) {
    json_free(value);
    return NULL;
  }
  return value;
}

void json_free(json* value) {
  while (value != NULL) {
    json* next = value->next;
    json_free(value->child);
    free(value);
    value = next;
  }
}

const json* json_get(const json* value, const char* key) {
  static const json missing = {JSON_NULL, NAN, "", NULL, NULL, NULL};
  if (value->type == JSON_OBJECT)
    for (const json* member = value->child; member != NULL; member = member->next)
      if (strcmp(member->key, key) == 0) return member;
  return &missing;
}
