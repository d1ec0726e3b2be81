#include "capi/parity/limits/noise.h"

#include <algorithm>
#include <cmath>

#include "capi/parity/logits.h"

namespace edgelm::capi {
namespace {

// The standard deviation of the difference of two means of `count` and `simulated` draws, per draw.
double spread(std::int64_t count, std::int64_t simulated) {
  return std::sqrt(1.0 / double(count) + 1.0 / double(simulated));
}

class Derivation {
 public:
  Derivation(const ParityPack& pack, const Limits& fixed)
      : pack_(pack),
        rounded_(*pack.rounded),
        want_(pack.target()),
        rules_(noise_rules()),
        fixed_(fixed),
        exact_(fixed_limits("none")) {
    const std::size_t width = std::size_t(pack.top), more = std::size_t(pack.probes());
    for (std::size_t j = 0; j < rounded_.rows.size(); ++j) {
      const std::size_t i = std::size_t(rounded_.rows[j]);
      kl_.push_back(bucketed_kl(want_, i, rounded_, j, pack.top));
      error_.push_back(logit_error(want_, i, rounded_, j, pack));
      likely_.push_back(logit_error(want_, i, rounded_, j, pack, likely_tokens()));
      Values logits(want_.top_logits.data() + i * width, want_.top_logits.data() + (i + 1) * width);
      logits.insert(logits.end(), want_.probe_logits.data() + i * more, want_.probe_logits.data() + (i + 1) * more);
      size_.push_back(error_.back() * deviation(logits));
    }
    // If every position flips, use all: there is nothing else.
    const bool all = capi::count(rounded_.flipped) == std::int64_t(rounded_.flipped.size());
    for (const bool flipped : rounded_.flipped) calm_.push_back(all || !flipped);
  }

  Limits run() const {
    const std::int64_t count = pack_.count();
    const double factor = rules_.factor, square = factor * factor;
    const bool few = pack_.num_experts && double(capi::count(rounded_.flipped)) < rules_.flips;
    const double unseen = few ? std::max(rules_.flip_kl, largest(kl_)) : 0;
    std::int64_t steps = 0;
    for (const GoldenPrompt& prompt : pack_.prompts) steps += prompt.steps();
    Values smooth, tipped;
    for (std::size_t i = 0; i < kl_.size(); ++i) {
      smooth.push_back(rounded_.flipped[i] ? 0 : kl_[i]);
      tipped.push_back(rounded_.flipped[i] ? kl_[i] : 0);
    }
    Limits limits = fixed_;
    limits.kl_mean = exact_.kl_mean + square * mean_of(smooth, count) + factor * mean_of(tipped, count) +
                     unseen / double(count);
    limits.kl_p99 = exact_.kl_p99 + below(kl_, 0.99, square, count);
    limits.kl_max = exact_.kl_max + std::max({square * rules_.largest * largest(where(kl_, calm_)),
                                              rules_.largest_flip * largest(tipped), rules_.largest * unseen});
    limits.logit_error = exact_.logit_error + below(error_, 0.5, factor, count);
    limits.logit_error_p90 = exact_.logit_error_p90 + below(error_, 0.9, factor, count);
    limits.decode_error = exact_.decode_error + below(likely_, 0.5, factor, std::max<std::int64_t>(steps, 1));
    limits.clear_gap = exact_.clear_gap +
                       factor * rules_.clear * std::sqrt(2.0) * quantile_of(where(size_, calm_), 0.9, count);
    const std::int64_t clear = clear_steps(limits.clear_gap);
    limits.top1_clear = 1 - share_that_may_differ(limits.clear_gap, 0);
    limits.greedy_clear = std::floor(double(clear) *
                                     share_that_may_differ(limits.clear_gap, std::max<std::int64_t>(clear, 1)));
    limits.perplexity = exact_.perplexity + perplexity_limit(unseen);
    return limits;
  }

 private:
  double below(const Values& values, double q, double margin, std::int64_t draws) const {
    return std::max(margin * quantile_of(where(values, calm_), q, draws), quantile_of_more(values, q, draws));
  }

  double shift(double q, std::int64_t count, std::size_t simulated) const {
    return rules_.z * std::sqrt(q * (1 - q)) * spread(count, std::int64_t(simulated));
  }

  // An upper bound of the q-quantile of `count` further draws.
  double quantile_of(const Values& values, double q, std::int64_t count) const {
    return quantile(values, std::min(1.0, q + shift(q, count, values.size())));
  }

  // The same if `factor` times as many draws exceed any level, without being larger.
  double quantile_of_more(const Values& values, double q, std::int64_t count) const {
    const double tail = 1 - q - shift(q, count, values.size());
    return tail > 0 ? quantile(values, 1 - tail / rules_.factor) : rules_.largest * largest(values);
  }

  // An upper bound of the mean of `count` further draws.
  double mean_of(const Values& values, std::int64_t count) const {
    return mean(values) + rules_.z * deviation(values) * spread(count, std::int64_t(values.size()));
  }

  std::int64_t clear_steps(double gap) const {
    const Mask clear = clear_positions(want_, gap);
    std::int64_t steps = 0;
    for (const GoldenPrompt& prompt : pack_.prompts) {
      for (std::int64_t i = 0; i < prompt.steps(); ++i) steps += clear[std::size_t(prompt.first_greedy() + i)];
    }
    return steps;
  }

  // The share of `count` clear choices that may differ, 0 for as many as are clear.
  double share_that_may_differ(double gap, std::int64_t count) const {
    const Mask clear = clear_positions(want_, gap);
    std::int64_t simulated = 0, different = 0;
    for (std::size_t j = 0; j < rounded_.rows.size(); ++j) {
      const std::size_t row = std::size_t(rounded_.rows[j]);
      simulated += clear[row];
      different += clear[row] && rounded_.best[j] != want_.best[row];
    }
    if (!simulated) return 1;
    if (!pack_.num_experts && !different) return 0;
    const double root = std::sqrt((rules_.factor * double(different) + 3.0 / 8) / double(simulated)) +
                        rules_.z / 2 * spread(count ? count : capi::count(clear), simulated);
    return std::min(1.0, root * root);
  }

  // The largest allowed difference of the ratio of perplexities from 1.
  double perplexity_limit(double unseen) const {
    const Mask text = pack_.has_next();
    Values change;
    for (std::size_t j = 0; j < rounded_.rows.size(); ++j) {
      const std::size_t row = std::size_t(rounded_.rows[j]);
      if (!text[row]) continue;
      change.push_back((rounded_.next_logit[j] - rounded_.logsumexp[j]) -
                       (want_.next_logit[row] - want_.logsumexp[row]));
    }
    if (change.empty()) return 0;
    const std::int64_t count = capi::count(text);
    const double bound = std::abs(mean(change)) +
                         rules_.z * deviation(change) * spread(count, std::int64_t(change.size()));
    return std::expm1(std::min(rules_.factor * bound + unseen / double(count), 100.0));
  }

  const ParityPack& pack_;
  const RoundedRecord& rounded_;
  const ReferenceRecord& want_;
  const NoiseRules& rules_;
  const Limits& fixed_;
  const Limits exact_;
  Values kl_, error_, likely_, size_;
  Mask calm_;
};

}  // namespace

Limits rounding_limits(const ParityPack& pack, const Limits& limits) {
  return pack.rounded ? Derivation(pack, limits).run() : limits;
}

}  // namespace edgelm::capi
