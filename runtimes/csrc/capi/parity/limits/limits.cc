#include "capi/parity/limits/limits.h"

#include <algorithm>
#include <cstring>

#include "limits_json.h"  // made by CMake

namespace edgelm::capi {
namespace {

const Json& table() {
  static const Json json = Json::parse(kLimitsJson, "limits.json", EDGELM_INTERNAL);
  return json;
}

Members part(const char* name) { return Members(table(), "limits.json", EDGELM_INTERNAL).object(name); }

bool is_space(char c) { return std::strchr(" \t\n\r\f\v", c) != nullptr && c != 0; }

// Match at `at`, a line's start, what kind_of looks for; return the type, such as "int4", or "" without a match.
std::string type_at(const std::string& text, std::size_t at) {
  const auto space = [&] {
    while (at < text.size() && is_space(text[at])) ++at;
  };
  const auto accept = [&](const char* word) {
    const bool found = text.compare(at, std::strlen(word), word) == 0;
    if (found) at += std::strlen(word);
    return found;
  };
  space();
  if (!accept("default") && !accept("scheme")) return "";
  space();
  if (!accept("=")) return "";
  space();
  if (!accept("\"") && !accept("'")) return "";
  const std::size_t start = at;
  if (!accept("int") && !accept("fp")) return "";
  const std::size_t digits = at;
  while (at < text.size() && text[at] >= '0' && text[at] <= '9') ++at;
  return at == digits ? "" : text.substr(start, at - start);
}

}  // namespace

Limits fixed_limits(const std::string& kind) {
  const Members values = part("fixed").object(part("kinds").object(kind).string("limits"));
  Limits limits = {};
  for (const LimitField& field : kLimitFields) limits.*field.value = values.number(field.name);
  return limits;
}

LossWarning loss_warning(const std::string& kind) {
  const Members values = part("kinds").object(kind).object("warning");
  return {values.number("kl"), values.number("perplexity")};
}

const NoiseRules& noise_rules() {
  static const NoiseRules rules = [] {
    const Members noise = part("noise");
    return NoiseRules{noise.number("factor"),       noise.number("z"),     noise.number("largest"),
                      noise.number("largest_flip"), noise.number("flips"), noise.number("flip_kl"),
                      noise.number("clear")};
  }();
  return rules;
}

const LayerRules& layer_rules() {
  static const LayerRules rules = [] {
    const Members layers = part("layers");
    return LayerRules{layers.number("floor"),
                      layers.number("single"),
                      layers.number("suspect"),
                      layers.number("before_router"),
                      layers.number("before_router_if_seen"),
                      layers.number("router_rounding")};
  }();
  return rules;
}

std::int64_t likely_tokens() { return Members(table(), "limits.json", EDGELM_INTERNAL).integer("likely"); }

std::string kind_of(const std::string& recipe_toml) {
  const Json::Object& kinds = part("kinds").json().object();
  std::size_t coarsest = 0;  // "none"
  for (std::size_t line = 0; line <= recipe_toml.size();) {
    const std::string type = type_at(recipe_toml, line);
    if (!type.empty()) {
      const auto found = std::find_if(kinds.begin(), kinds.end(), [&](const auto& kind) { return kind.first == type; });
      if (found == kinds.end()) {
        std::string known;
        for (const auto& kind : kinds) known += (known.empty() ? "" : ", ") + kind.first;
        fail(EDGELM_BUNDLE, "there are no parity limits for ", type, "; there are: ", known);
      }
      coarsest = std::max(coarsest, std::size_t(found - kinds.begin()));
    }
    const std::size_t end = recipe_toml.find('\n', line);
    if (end == recipe_toml.npos) break;
    line = end + 1;
  }
  return kinds[coarsest].first;
}

Limits limits_for(const Manifest& manifest, const std::string& kind) {
  // Types in which the shipped graph and the debug graph compute: on a GPU float32 only in our own debug graph.
  const bool exact = manifest.target == "cpu" || manifest.dtype == "float32";
  const std::string shipped = exact ? "float32" : manifest.dtype;
  const std::string debug = manifest.target == "cuda" ? shipped : "float32";
  const Members of_values = part("values").object(shipped), of_debug = part("debug_values").object(debug);
  Limits limits = fixed_limits(kind);
  for (const LimitField& field : kLimitFields) {
    for (const Members* least : {&of_values, &of_debug}) {
      if (least->has(field.name)) limits.*field.value = std::max(limits.*field.value, least->number(field.name));
    }
  }
  limits.top1_clear = std::min(limits.top1_clear, part("top1_clear").number(shipped));
  return limits;
}

}  // namespace edgelm::capi
