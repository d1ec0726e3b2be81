/* A reader of JSON for programs in C that use edgelm.h alone: it reads what libedgelm writes. */
#ifndef EDGELM_CAPI_PROGRAMS_JSON_READER_H_
#define EDGELM_CAPI_PROGRAMS_JSON_READER_H_

#include <stddef.h>

typedef enum json_type {
  JSON_NULL,
  JSON_FALSE,
  JSON_TRUE,
  JSON_NUMBER,
  JSON_STRING,
  JSON_ARRAY,
  JSON_OBJECT
} json_type;

typedef struct json {
  json_type type;
  double number;      /* of JSON_NUMBER; NaN for other types */
  const char* string; /* of JSON_STRING, in UTF-8; "" for other types */
  const char* key;    /* of a member of an object; NULL for others */
  struct json* child; /* first value of an array or object */
  struct json* next;  /* next value of the same array or object */
} json;

/* Parse a text that ends with 0, which is changed: strings are decoded in place. Returns NULL for a text that is not JSON,
 * that is nested deeper than 100, or without memory. Free it with json_free, before the text. */
json* json_parse(char* text);
void json_free(json* value);

/* A member of an object. A null for what is missing or no object, so that calls can be chained; never NULL. */
const json* json_get(const json* value, const char* key);

#endif /* EDGELM_CAPI_PROGRAMS_JSON_READER_H_ */
