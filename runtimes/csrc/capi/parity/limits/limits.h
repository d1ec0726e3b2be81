// The limits of the parity check and its other constants, from edgelm/parity/tables/limits.json, which CMake compiles in.
// As edgelm/parity/limits.py, which explains them.
#pragma once

#include <cstdint>
#include <string>

#include "capi/bundle/bundle.h"

namespace edgelm::capi {

struct Limits {
  double kl_mean, kl_p99, kl_max, logit_error, logit_error_p90, decode_error, clear_gap, top1_clear, greedy_clear,
      perplexity, embedding_error, layer_base, layer_gain, bad_positions, router_near_tie, head_error;
};

// Every limit by name.
struct LimitField {
  const char* name;
  double Limits::* value;
};
constexpr LimitField kLimitFields[] = {
    {"kl_mean", &Limits::kl_mean},
    {"kl_p99", &Limits::kl_p99},
    {"kl_max", &Limits::kl_max},
    {"logit_error", &Limits::logit_error},
    {"logit_error_p90", &Limits::logit_error_p90},
    {"decode_error", &Limits::decode_error},
    {"clear_gap", &Limits::clear_gap},
    {"top1_clear", &Limits::top1_clear},
    {"greedy_clear", &Limits::greedy_clear},
    {"perplexity", &Limits::perplexity},
    {"embedding_error", &Limits::embedding_error},
    {"layer_base", &Limits::layer_base},
    {"layer_gain", &Limits::layer_gain},
    {"bad_positions", &Limits::bad_positions},
    {"router_near_tie", &Limits::router_near_tie},
    {"head_error", &Limits::head_error},
};

// Limits above which the loss against the float model is large.
struct LossWarning { double kl, perplexity; };

struct NoiseRules { double factor, z, largest, largest_flip, flips, flip_kl, clear; };

struct LayerRules { double floor, single, suspect, before_router, before_router_if_seen, router_rounding; };

Limits fixed_limits(const std::string& kind);
LossWarning loss_warning(const std::string& kind);
const NoiseRules& noise_rules();
const LayerRules& layer_rules();
// Number of recorded tokens over which the error of a decoding step is taken.
std::int64_t likely_tokens();

// The kind of a recipe: the coarsest type of its default and its rules, "none" if all is float. Throws
// Error(EDGELM_BUNDLE) if there are no limits for a type.
std::string kind_of(const std::string& recipe_toml);
// The fixed limits of a bundle whose recipe is of this kind: wider where a graph computes in float16 or bfloat16.
Limits limits_for(const Manifest& manifest, const std::string& kind);

}  // namespace edgelm::capi
