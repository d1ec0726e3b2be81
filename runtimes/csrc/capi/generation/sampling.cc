#include "capi/generation/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>

#include "capi/common/error.h"
#include "capi/common/json.h"

namespace edgelm::capi {
namespace {

using Id = std::int32_t;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// First number of candidates for top-p. The tokens kept are almost always fewer; otherwise more are tried.
constexpr std::int64_t kFirstGuess = 1024, kBlock = 32;
constexpr double kLeast = 1e-30, kMost = 1e30;

// Tokens that pass the filters, and their probabilities. `all`: every token in order; `ids` is empty.
struct Candidates {
  std::vector<Id> ids;
  std::vector<double> probabilities;
  bool all = false;
};

// So that no logit overflows float32. Beyond the limits nothing would change.
double clamped(double value) { return std::min(std::max(value, kLeast), kMost); }

float rounded(double value) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  if (std::abs(value) > kLargest)
    return std::copysign(std::numeric_limits<float>::infinity(), float(value > 0 ? 1 : -1));
  return float(value);
}

// The sum in the order of numpy's pairwise summation, which rounds in the same places.
double sum_of(const double* values, std::size_t size) {
  if (size < 8) return std::accumulate(values, values + size, -0.0);
  if (size <= 128) {
    double part[8];
    std::copy(values, values + 8, part);
    std::size_t i = 8;
    for (; i < size - size % 8; i += 8)
      for (std::size_t k = 0; k < 8; ++k) part[k] += values[i + k];
    const double sum = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
    return std::accumulate(values + i, values + size, sum);
  }
  const std::size_t half = size / 2 - size / 2 % 8;
  return sum_of(values, half) + sum_of(values + half, size - half);
}

void normalise(std::vector<double>& weights) {
  const double sum = sum_of(weights.data(), weights.size());
  for (double& weight : weights) weight /= sum;
}

std::vector<double> weights_of(const float* logits, std::int64_t size, float highest, const Sampling& options) {
  const float temperature = float(clamped(options.temperature));
  std::vector<double> weights(static_cast<std::size_t>(size));
  for (std::int64_t i = 0; i < size; ++i)
    weights[std::size_t(i)] = std::exp(double((logits[i] - highest) / temperature));
  return weights;
}

// The count-th highest of `values`, which change their order.
float nth_highest(std::vector<float>& values, std::int64_t count) {
  std::nth_element(values.begin(), values.begin() + (count - 1), values.end(), std::greater<float>());
  return values[std::size_t(count - 1)];
}

std::vector<Id> at_least(const float* logits, std::int64_t size, float bound) {
  std::vector<Id> ids;
  for (std::int64_t i = 0; i < size; ++i)
    if (logits[i] >= bound) ids.push_back(Id(i));
  return ids;
}

// Ids that include the `count` highest logits and all ties with the last of them; all ids for a large count.
std::vector<Id> at_least_best(const float* logits, std::int64_t size, std::int64_t count) {
  const std::int64_t blocks = size / kBlock;
  if (size / 4 < count) {
    std::vector<Id> ids(static_cast<std::size_t>(size));
    std::iota(ids.begin(), ids.end(), 0);
    return ids;
  }
  if (blocks < 2 * count) {
    std::vector<float> values(logits, logits + size);
    return at_least(logits, size, nth_highest(values, count));
  }
  // At least `count` logits reach the count-th highest of the maxima of strided blocks.
  std::vector<float> maxima(logits, logits + blocks);
  for (std::int64_t row = 1; row < kBlock; ++row)
    for (std::int64_t i = 0; i < blocks; ++i)
      maxima[std::size_t(i)] = std::max(maxima[std::size_t(i)], logits[row * blocks + i]);
  return at_least(logits, size, nth_highest(maxima, count));
}

std::vector<float> gathered(const float* logits, const std::vector<Id>& ids) {
  std::vector<float> chosen(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) chosen[i] = logits[ids[i]];
  return chosen;
}

// Ids of the k highest logits and of all ties with the k-th.
std::vector<Id> top_k(const float* logits, std::int64_t size, std::int64_t k) {
  std::vector<Id> ids = at_least_best(logits, size, k);
  std::vector<float> chosen = gathered(logits, ids);
  const float bound = nth_highest(chosen, k);
  ids.erase(std::remove_if(ids.begin(), ids.end(), [&](Id id) { return !(logits[id] >= bound); }), ids.end());
  return ids;
}

// Indices of the fewest highest scores whose exponentials sum to `top_p` of the total: of all scores, or as given. None
// if these scores do not reach it.
std::optional<std::vector<std::size_t>> nucleus(const std::vector<double>& scores, double top_p, const double* total) {
  std::vector<std::size_t> order(scores.size());
  std::iota(order.begin(), order.end(), std::size_t(0));
  // NaN, which follows from logits that overflow, comes last.
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return scores[a] > scores[b] || (!std::isnan(scores[a]) && std::isnan(scores[b]));
  });
  std::vector<double> reached(order.size());
  double sum = 0;
  for (std::size_t i = 0; i < order.size(); ++i)
    reached[i] = sum = i == 0 ? std::exp(scores[order[0]]) : sum + std::exp(scores[order[i]]);
  const double limit = top_p * (total == nullptr ? sum : *total);
  if (total != nullptr && sum < limit) return std::nullopt;
  // A token is kept while the tokens above it do not reach top_p; the first is always kept.
  const auto place = std::size_t(std::lower_bound(reached.begin(), reached.end(), limit) - reached.begin());
  order.resize(std::min(place + 1, order.size()));
  return order;
}

// Apply top-p and min-p to `ids`. `total`: the sum of exp((logit - highest) / temperature) over the vocabulary; null:
// these tokens are all. No result if other tokens may be left as well.
std::optional<Candidates> filtered(std::vector<Id> ids, const float* all, const Sampling& options,
                                   const double* total = nullptr) {
  std::vector<float> logits = gathered(all, ids);
  const float highest = *std::max_element(logits.begin(), logits.end());
  const double temperature = clamped(options.temperature);
  const double threshold = options.min_p > 0 ? std::log(options.min_p) : -kInfinity;
  if (options.top_p == 1 && options.min_p > 0) {
    // A cheap first filter with a small margin; the exact test follows below.
    const double floor = double(highest) + temperature * threshold;
    const float near = rounded(floor - 1e-3 * (1 + std::abs(floor)));
    ids.erase(std::remove_if(ids.begin(), ids.end(), [&](Id id) { return !(all[id] >= near); }), ids.end());
    logits = gathered(all, ids);
  }
  std::vector<double> scores(logits.size());
  for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = (double(logits[i]) - double(highest)) / temperature;
  std::vector<std::size_t> kept(scores.size());
  std::iota(kept.begin(), kept.end(), std::size_t(0));
  if (options.top_p < 1) {
    auto found = nucleus(scores, options.top_p, total);
    if (!found) return std::nullopt;
    kept = std::move(*found);
  }
  Candidates result;
  for (const std::size_t i : kept) {
    if (options.min_p > 0 && !(scores[i] >= threshold)) continue;
    result.ids.push_back(ids[i]);
    result.probabilities.push_back(std::exp(scores[i]));
  }
  normalise(result.probabilities);
  return result;
}

// Tokens that pass the filters, for a temperature above 0.
Candidates candidates(const float* logits, std::int64_t size, const Sampling& options) {
  if (options.top_k > 0 && options.top_k < size) return *filtered(top_k(logits, size, options.top_k), logits, options);
  if (options.top_p == 1 && options.min_p > 0) return *filtered(at_least_best(logits, size, size), logits, options);
  std::vector<double> weights = weights_of(logits, size, *std::max_element(logits, logits + size), options);
  if (options.top_p == 1) {
    normalise(weights);
    return {{}, std::move(weights), true};
  }
  const double sum = sum_of(weights.data(), weights.size());
  const double* total = &sum;
  for (std::int64_t guess = kFirstGuess;; guess *= 16) {
    std::vector<Id> ids = at_least_best(logits, size, guess);
    if (guess > kFirstGuess && std::int64_t(ids.size()) == size) total = nullptr;
    if (auto found = filtered(std::move(ids), logits, options, total)) return std::move(*found);
  }
}

// The token where the cumulative distribution passes `uniform`.
Id draw(const Candidates& from, double uniform) {
  std::vector<double> cumulative(from.probabilities.size());
  std::partial_sum(from.probabilities.begin(), from.probabilities.end(), cumulative.begin());
  if (cumulative.empty()) return 0;  // only if logits overflowed
  const auto found = std::upper_bound(cumulative.begin(), cumulative.end(), uniform * cumulative.back());
  const std::size_t place = std::min(std::size_t(found - cumulative.begin()), cumulative.size() - 1);
  return from.all ? Id(place) : from.ids[place];
}

std::int64_t place_of_highest(const float* logits, std::int64_t size) {
  std::int64_t best = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    if (std::isnan(logits[i])) return i;
    if (logits[i] > logits[best]) best = i;
  }
  return best;
}

void require(bool right, const char* name, double value, const char* wanted) {
  if (!right) fail(EDGELM_INVALID_ARGUMENT, name, " is ", python_repr(value), ": it has to be ", wanted);
}

std::uint64_t random_seed() {
  std::random_device device;
  return std::uint64_t(device()) << 32 | device();
}

}  // namespace

void Sampling::check() const {
  require(temperature >= 0 && temperature < kInfinity, "temperature", temperature, "a number, 0 (greedy) or more");
  if (top_k < 0) fail(EDGELM_INVALID_ARGUMENT, "top_k is ", top_k, ": it has to be an integer, 0 (all tokens) or more");
  require(top_p > 0 && top_p <= 1, "top_p", top_p, "a number, more than 0 and at most 1 (all tokens)");
  require(min_p >= 0 && min_p <= 1, "min_p", min_p, "a number, 0 (all tokens) to 1");
  require(repetition_penalty > 0 && repetition_penalty < kInfinity, "repetition_penalty", repetition_penalty,
          "a number, more than 0 (1 changes nothing)");
  std::string idle;
  for (const auto& [name, given] : {std::pair("top_k", top_k != 0), {"top_p", top_p != 1}, {"min_p", min_p != 0}})
    if (given) idle += concat(idle.empty() ? "" : " and ", name);
  if (greedy() && !idle.empty())
    fail(EDGELM_INVALID_ARGUMENT, idle,
         " would do nothing with temperature 0 (greedy): give a temperature, such as 0.8");
}

std::int32_t argmax(const float* logits, std::int64_t size) {
  const std::int64_t token = place_of_highest(logits, size);
  if (!std::isfinite(logits[token]))
    fail(
        EDGELM_RUNTIME, "the model's highest logit is ", python_repr(logits[token]),
        ": the bundle is damaged or its runtime is at fault; check with `edgelm inspect --verify` and `edgelm parity`");
  return std::int32_t(token);
}

std::int32_t choose(const float* logits, std::int64_t size, const Sampling& options,
                    const std::vector<std::int32_t>& seen, double uniform) {
  std::vector<float> penalised;
  if (!seen.empty()) {
    penalised.assign(logits, logits + size);
    const float factor = float(clamped(options.repetition_penalty));
    for (const Id id : seen) {
      float& logit = penalised[std::size_t(id)];
      logit = logit < 0 ? logit * factor : logit / factor;
    }
    logits = penalised.data();
  }
  if (options.greedy()) return Id(place_of_highest(logits, size));
  return draw(candidates(logits, size, options), uniform);
}

Sampler::Sampler(const Sampling& options, const std::vector<std::int32_t>& seen, std::int64_t size)
    : options_(options), size_(size), random_(options.seed ? *options.seed : random_seed()) {
  if (options.repetition_penalty == 1) return;
  occurs_.resize(std::size_t(size));
  for (const Id id : seen) count(id);
}

void Sampler::count(std::int32_t token) {
  if (occurs_[std::size_t(token)]) return;
  occurs_[std::size_t(token)] = true;
  seen_.push_back(token);
}

std::int32_t Sampler::sample(const float* logits) {
  const double uniform = random_.uniform();
  const Id best = argmax(logits, size_);
  const Id token = options_.plain() ? best : choose(logits, size_, options_, seen_, uniform);
  if (options_.repetition_penalty != 1) count(token);
  return token;
}

}  // namespace edgelm::capi
