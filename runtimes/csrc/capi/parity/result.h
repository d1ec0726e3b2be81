// What a parity check found. As edgelm/parity/result.py, which describes every field.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace edgelm::capi {

struct Check {
  std::string name, title;
  std::optional<bool> passed;  // none where nothing could be checked
  std::string detail;
  std::optional<double> value = {}, limit = {};
  bool higher = false;  // whether the value passes at or above the limit
  std::optional<std::int64_t> layer = {};
};

// NaN fails: the device computed no number.
inline Check at_most(std::string name, std::string title, double value, double limit, std::string detail = "",
                     std::optional<std::int64_t> layer = {}) {
  return {std::move(name), std::move(title), value <= limit, std::move(detail), value, limit, false, layer};
}
inline Check at_least(std::string name, std::string title, double value, double limit, std::string detail = "") {
  return {std::move(name), std::move(title), value >= limit, std::move(detail), value, limit, true, {}};
}

// Loss against the float model. Without `known` there are no numbers.
struct FloatLoss {
  bool known;
  double kl, kl_reference, perplexity, perplexity_reference;
  std::optional<std::string> warning;
};

struct LayerResult {
  std::int64_t layer;
  double error, error_float, added, worst;
  std::int64_t bad;
  bool diverged;
  double clear, near;
  std::int64_t clear_count, near_count;
  double same_float;
  std::int64_t severe_flips;
};

struct Diagnosis {
  std::vector<LayerResult> layers;
  double embedding_error = 0;
  std::optional<std::int64_t> first;  // layer; -1: the embedding; none: no layer differs
  std::optional<std::string> cause;   // "PLACE: EVIDENCE"
  std::int64_t experts_seen = 0, experts_total = 0;
};

}  // namespace edgelm::capi
