#include "capi/chat/syntax/names.h"

#include <algorithm>

namespace edgelm::capi::chat {

namespace {

template <class Names>
bool among(const Names& names, std::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

}  // namespace

Known filter_named(std::string_view name) {
  static const std::string_view supported[] = {
      "abs",        "attr",    "batch",   "capitalize", "center", "count",    "d",          "default", "dictsort",
      "e",          "escape",  "first",   "float",      "format", "groupby",  "indent",     "int",     "items",
      "join",       "last",    "length",  "list",       "lower",  "map",      "max",        "min",     "reject",
      "rejectattr", "replace", "reverse", "round",      "safe",   "select",   "selectattr", "slice",   "sort",
      "string",     "sum",     "title",   "tojson",     "trim",   "truncate", "unique",     "upper",   "wordcount"};
  static const std::string_view unsupported[] = {"filesizeformat", "forceescape", "pprint",   "random", "striptags",
                                                 "urlencode",      "urlize",      "wordwrap", "xmlattr"};
  return among(supported, name) ? Known::kSupported : among(unsupported, name) ? Known::kUnsupported : Known::kMissing;
}

Known test_named(std::string_view name) {
  static const std::string_view supported[] = {
      "odd",     "even",   "divisibleby", "defined",  "undefined", "filter", "test",    "none",
      "boolean", "false",  "true",        "integer",  "float",     "lower",  "upper",   "string",
      "mapping", "number", "sequence",    "iterable", "callable",  "sameas", "escaped", "in",
      "==",      "eq",     "equalto",     "!=",       "ne",        ">",      "gt",      "greaterthan",
      "ge",      ">=",     "<",           "lt",       "lessthan",  "<=",     "le"};
  return among(supported, name) ? Known::kSupported : Known::kMissing;
}

}  // namespace edgelm::capi::chat
