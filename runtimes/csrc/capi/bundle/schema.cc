#include "capi/bundle/schema.h"

#include <algorithm>

namespace edgelm::capi {

namespace {

using Place = Schema::Place;

struct Problem { std::string path, text; };

std::string path_of(const Place* place) {
  if (place == nullptr) return "";
  const std::string outer = path_of(place->outer);
  if (place->key.data() == nullptr) return concat(outer, "[", place->index, "]");
  const bool plain = !place->key.empty() && place->key.size() <= 60 &&
                     std::all_of(place->key.begin(), place->key.end(), [](char c) { return c > ' ' && c < '\x7f'; });
  return concat(outer, outer.empty() ? "" : ".", plain ? std::string(place->key) : quoted(place->key));
}

[[noreturn]] void refuse(const Place& place, std::string problem) {
  const std::string path = path_of(&place);
  throw Problem{path.empty() ? "it" : path, std::move(problem)};
}

[[noreturn]] void expect(const std::string& kind, const Json& value, const Place& place) {
  refuse(place, concat("is ", shown(value), ", expected ", kind));
}

}  // namespace

void Schema::require(const Json& document, const std::string& where, const std::string& advice,
                     edgelm_code code) const {
  try {
    // The document itself has no path.
    check_(document, Place{nullptr, "", 0});
  } catch (const Problem& problem) {
    fail(code, where, ": ", problem.path, " ", problem.text, ": ", advice);
  }
}

Schema whole(std::int64_t least, std::int64_t most) {
  const std::string kind = most == INT64_MAX ? concat("a whole number of ", least, " or more")
                                             : concat("a whole number from ", least, " to ", most);
  return {kind, [=](const Json& value, const Place& place) {
            if (!value.is_integer() || value.integer() < least || value.integer() > most) expect(kind, value, place);
          }};
}

Schema text() {
  return {"a text", [](const Json& value, const Place& place) {
            if (!value.is_string()) expect("a text", value, place);
          }};
}

Schema true_or_false() {
  return {"true or false", [](const Json& value, const Place& place) {
            if (!value.is_bool()) expect("true or false", value, place);
          }};
}

Schema one_of(std::vector<std::string> choices) {
  std::string kind;
  for (const std::string& choice : choices) kind += (kind.empty() ? "" : " or ") + quoted(choice);
  return {kind, [kind, choices = std::move(choices)](const Json& value, const Place& place) {
            if (!value.is_string() || std::find(choices.begin(), choices.end(), value.string()) == choices.end()) {
              expect(kind, value, place);
            }
          }};
}

Schema nullable(Schema inner) {
  const std::string kind = inner.kind() + " or null";
  return {kind, [kind, inner = std::move(inner)](const Json& value, const Place& place) {
            if (value.is_null()) return;
            inner.check(value, place);
          }};
}

Schema list_of(Schema inner) {
  return {"a list", [inner = std::move(inner)](const Json& value, const Place& place) {
            if (!value.is_array()) expect("a list", value, place);
            Place item{&place, {}, 0};
            for (const Json& element : value.array()) {
              inner.check(element, item);
              ++item.index;
            }
          }};
}

Schema map_of(Schema inner) {
  return {"an object", [inner = std::move(inner)](const Json& value, const Place& place) {
            if (!value.is_object()) expect("an object", value, place);
            for (const auto& [key, element] : value.object()) inner.check(element, Place{&place, key, 0});
          }};
}

Schema object_of(std::vector<Field> fields) {
  return {"an object", [fields = std::move(fields)](const Json& value, const Place& place) {
            if (!value.is_object()) expect("an object", value, place);
            for (const auto& [key, element] : value.object()) {
              const Place inner{&place, key, 0};
              const auto field = std::find_if(fields.begin(), fields.end(),
                                              [&name = key](const Field& candidate) { return candidate.name == name; });
              if (field == fields.end()) {
                refuse(inner, "is an unknown field (upgrade EdgeLM if a newer one wrote this file)");
              }
              field->schema.check(element, inner);
            }
            for (const Field& field : fields) {
              if (field.required && value.find(field.name) == nullptr) {
                refuse(Place{&place, field.name, 0}, "is missing, expected " + field.schema.kind());
              }
            }
          }};
}

}  // namespace edgelm::capi
