#include "capi/parity/diagnose.h"

#include <algorithm>
#include <set>

#include "capi/parity/numbers/format.h"

namespace edgelm::capi {
namespace {

double distance(const float* a, const float* b) {
  double sum = 0;
  for (int j = 0; j < kSketchWidth; ++j) sum += (double(a[j]) - b[j]) * (double(a[j]) - b[j]);
  return std::sqrt(sum / double(kSketchWidth));
}

// |actual - expected| / |expected| at every position of one hidden state.
Values relative_error(const ReferenceRecord& want, const DeviceTrace& trace, std::int64_t index, std::int64_t count) {
  Values error;
  const std::size_t first = std::size_t(index * count);
  for (std::size_t row = first; row < first + std::size_t(count); ++row) {
    const double size = distance(want.sketches.data() + row * kSketchWidth, trace.sketches.data() + row * kSketchWidth);
    error.push_back(size / std::max(double(want.norms[row]), 1e-30));
  }
  return error;
}

// Per position: whether the sets of chosen experts differ, and the reference logit of the best dropped expert minus that
// of the worst added one, in standard deviations.
struct Flips {
  Mask changed;
  Values severity;
};

Values row_of(const float* router, std::int64_t experts) { return Values(router, router + experts); }

Flips expert_flips(const ReferenceRecord& want, const DeviceTrace& trace, std::int64_t index, std::int64_t count,
                   std::int64_t experts) {
  Flips flips = {Mask(std::size_t(count), false), Values(std::size_t(count), 0)};
  for (std::int64_t n = 0; n < count; ++n) {
    const std::int32_t* expected = want.experts.data() + (index * count + n) * want.chosen;
    const std::int32_t* actual = trace.experts.data() + (index * count + n) * trace.chosen;
    const std::set<std::int32_t> wanted(expected, expected + want.chosen), got(actual, actual + trace.chosen);
    const float* router = want.router.data() + (index * count + n) * experts;
    constexpr double infinite = std::numeric_limits<double>::infinity();
    double dropped = -infinite, added = infinite;
    bool changed = false;
    for (const std::int32_t expert : wanted) {
      if (got.count(expert)) continue;
      dropped = std::max(dropped, double(router[expert]));
      changed = true;
    }
    for (const std::int32_t expert : got) {
      if (!wanted.count(expert)) added = std::min(added, double(router[expert]));
    }
    if (!changed) continue;
    flips.changed[std::size_t(n)] = true;
    flips.severity[std::size_t(n)] = (dropped - added) / std::max(deviation(row_of(router, experts)), 1e-12);
  }
  return flips;
}

// The gap of the k-th and the next router logit in standard deviations; infinite where every expert is chosen.
double router_margin(const float* router, std::int64_t experts, std::int64_t k) {
  if (k >= experts) return std::numeric_limits<double>::infinity();
  Values ordered = row_of(router, experts);
  const double spread = std::max(deviation(ordered), 1e-12);
  std::sort(ordered.begin(), ordered.end(), std::greater<>());
  return (ordered[std::size_t(k) - 1] - ordered[std::size_t(k)]) / spread;
}

// The error that attention can bring from earlier positions: their mean, or a share of the largest.
Values mixed_in(const ParityPack& pack, const Values& error) {
  Values result(error.size());
  for (const GoldenPrompt& prompt : pack.prompts) {
    double sum = 0, most = error[std::size_t(prompt.start)];
    for (std::int64_t i = 0; i < prompt.fed(); ++i) {
      const std::size_t row = std::size_t(prompt.start + i);
      sum += error[row];
      most = larger(most, error[row]);
      result[row] = larger(sum / double(i + 1), layer_rules().single * most);
    }
  }
  return result;
}

// Per position of one layer: whether it is bad, whether it counts, error of the update, error of the input.
struct Suspects {
  Mask bad, counted;
  Values moved, incoming;
};

class Examination {
 public:
  Examination(const ParityPack& pack, const DeviceTrace& trace, const Limits& limits)
      : pack_(pack), want_(pack.target()), trace_(trace), limits_(limits), count_(pack.count()) {
    for (std::int64_t i = 0; i <= pack.num_layers; ++i) error_.push_back(relative_error(want_, trace, i, count_));
  }

  Diagnosis run() const {
    Diagnosis result;
    result.embedding_error = largest(error_[0]);
    if (!(result.embedding_error <= limits_.embedding_error)) {
      result.first = -1;
      result.cause = embedding_cause();
    }
    for (std::int64_t index = 0; index < pack_.num_layers; ++index) {
      Suspects suspects;
      const LayerResult layer = examine(index, suspects);
      if (!result.first && layer.diverged) {
        result.first = index;
        result.cause = cause(index, suspects);
      }
      result.layers.push_back(layer);
    }
    result.experts_total = pack_.num_experts * pack_.num_layers;
    const std::size_t chosen = std::size_t(count_ * want_.chosen);
    for (std::size_t at = 0; at < want_.experts.size(); at += chosen) {
      const auto* first = want_.experts.data() + at;
      result.experts_seen += std::int64_t(std::set<std::int32_t>(first, first + chosen).size());
    }
    return result;
  }

 private:
  bool has_experts() const { return pack_.num_experts != 0; }

  std::string embedding_cause() const {
    std::set<std::int32_t> tokens;
    for (std::size_t n = 0; n < error_[0].size(); ++n) {
      if (!(error_[0][n] <= limits_.embedding_error)) tokens.insert(pack_.ids[n]);
    }
    const std::set<std::int32_t> all(pack_.ids.begin(), pack_.ids.end());
    if (tokens.size() * 4 > all.size()) return "the embedding, most rows";
    std::string text;
    std::size_t shown = 0;
    for (const std::int32_t token : tokens) {
      if (shown++ == 8) break;
      text += concat(text.empty() ? "" : ", ", token);
    }
    return "the embedding, rows of token ids " + text;
  }

  // The error that a layer adds, relative to its update.
  Values added_error(std::int64_t index, Suspects& suspects) const {
    Values added;
    for (std::int64_t n = 0; n < count_; ++n) {
      const std::size_t row = std::size_t(index * count_ + n), next = row + std::size_t(count_);
      const float *before = want_.sketches.data() + row * kSketchWidth,
                  *after = want_.sketches.data() + next * kSketchWidth;
      const float *in = trace_.sketches.data() + row * kSketchWidth,
                  *out = trace_.sketches.data() + next * kSketchWidth;
      double moved = 0;
      for (int j = 0; j < kSketchWidth; ++j) {
        const double change = (double(out[j]) - after[j]) - (double(in[j]) - before[j]);
        moved += change * change;
      }
      suspects.moved.push_back(std::sqrt(moved / double(kSketchWidth)));
      const double least = float(layer_rules().floor) * want_.norms[row];
      const double scale = std::max({distance(after, before), least, 1e-30});
      added.push_back(suspects.moved.back() / scale);
    }
    return added;
  }

  LayerResult examine(std::int64_t index, Suspects& suspects) const {
    const Values added = added_error(index, suspects);
    const std::size_t size = std::size_t(count_);
    const Values &error = error_[std::size_t(index)], mixed = mixed_in(pack_, error);
    Flips flips = {Mask(size, false), Values(size, 0)};
    if (has_experts()) flips = expert_flips(want_, trace_, index, count_, pack_.num_experts);
    Mask clear, severe, same_clear, same_near;
    Values excess;
    for (std::size_t n = 0; n < size; ++n) {
      suspects.incoming.push_back(larger(error[n], mixed[n]));
      const double gained = limits_.layer_gain * suspects.incoming[n];
      excess.push_back(added[n] / (limits_.layer_base + gained));
      // An error of the input may flip a choice that is otherwise clear: the tolerance grows with it.
      severe.push_back(flips.changed[n] && !(flips.severity[n] < limits_.router_near_tie + gained));
      // At near-ties an MoE operator with logits of lower precision may choose other experts.
      const float* router = want_.router.data() + (index * count_ + std::int64_t(n)) * pack_.num_experts;
      clear.push_back(!has_experts() ||
                      router_margin(router, pack_.num_experts, want_.chosen) >= limits_.router_near_tie);
      suspects.counted.push_back(!flips.changed[n] && (clear[n] || !std::isfinite(excess[n])));
      suspects.bad.push_back((suspects.counted[n] && !(excess[n] <= 1)) || severe[n]);
      (clear[n] ? same_clear : same_near).push_back(!flips.changed[n]);
    }
    const std::int64_t bad = capi::count(suspects.bad);
    LayerResult result = {};
    result.layer = index;
    result.error = median(error_[std::size_t(index) + 1]);
    result.error_float = median(relative_error(pack_.reference, trace_, index + 1, count_));
    result.added = median(where(added, suspects.counted));
    result.worst = largest(where(excess, suspects.counted));
    result.bad = bad;
    result.diverged = double(bad) > limits_.bad_positions * double(count_);
    result.clear = share(same_clear);
    result.near = share(same_near);
    result.clear_count = std::int64_t(same_clear.size());
    result.near_count = std::int64_t(same_near.size());
    result.same_float = same_as_float(index);
    result.severe_flips = capi::count(severe);
    return result;
  }

  double same_as_float(std::int64_t index) const {
    if (!has_experts()) return kNan;
    Mask same = expert_flips(pack_.reference, trace_, index, count_, pack_.num_experts).changed;
    same.flip();
    return share(same);
  }

  // The part of layer `index` that is wrong, as closely as the evidence allows: "PLACE: EVIDENCE".
  std::string cause(std::int64_t index, const Suspects& suspects) const {
    Mask first(suspects.bad.size(), false), later, good;
    bool any_first = false;
    for (const GoldenPrompt& prompt : pack_.prompts) first[std::size_t(prompt.start)] = true;
    for (std::size_t n = 0; n < first.size(); ++n) {
      if (first[n]) any_first |= suspects.bad[n];
      if (!first[n]) later.push_back(suspects.bad[n]);
    }
    // A first token attends to itself alone, so errors of queries and keys cannot change it.
    const bool scores = !any_first && share(later) > 0.5;
    const std::string layer = concat("layer ", index, ", ");
    const std::string attention = layer +
                                  "attention scores (rotary embedding, query or key projection or norm, mask): first "
                                  "positions agree, later ones do not";
    if (!has_experts()) return scores ? attention : layer + "attention or feed-forward";
    std::string moe = layer + "the MoE block as a whole (routing weights, or gate and up): router logits agree";
    if (before_router(index, suspects)) {
      moe = layer + "attention, its norms or the router: router logits differ though the input agrees";
    } else {
      Mask bad(first.size());
      good.resize(first.size());
      for (std::size_t n = 0; n < first.size(); ++n) {
        bad[n] = suspects.bad[n] && suspects.counted[n];
        good[n] = !suspects.bad[n] && suspects.counted[n];
      }
      const auto guilty = guilty_experts(want_.experts.data() + index * count_ * want_.chosen, want_.chosen, bad, good);
      if (guilty) return layer + experts_text(*guilty);
    }
    return scores ? attention : moe;
  }

  static std::string experts_text(const std::vector<std::int32_t>& experts) {
    const bool several = experts.size() > 1;
    std::string text = several ? "experts " : "expert ";
    for (std::size_t i = 0; i < experts.size(); ++i) text += concat(i ? ", " : "", experts[i]);
    return text + ": only positions that chose " + (several ? "them" : "it") + " are wrong";
  }

  // Whether the router's logits already show the error of the layer's output.
  bool before_router(std::int64_t index, const Suspects& suspects) const {
    Values ratio, seen;
    std::int64_t missing = 0;
    for (std::int64_t n = 0; n < count_; ++n) {
      if (!suspects.bad[std::size_t(n)]) continue;
      const std::size_t row = std::size_t(index * count_ + n), experts = std::size_t(pack_.num_experts);
      double norm = 0, change = 0;
      for (std::size_t i = row * experts; i < (row + 1) * experts; ++i) {
        const double expected = want_.router[i], difference = trace_.router[i] - expected;
        norm += expected * expected;
        change += difference * difference;
      }
      seen.push_back(std::sqrt(change) / std::max(std::sqrt(norm), 1e-30));
      missing += std::isnan(seen.back());
      const double moved = suspects.moved[std::size_t(n)] / std::max(double(want_.norms[row]), 1e-30);
      ratio.push_back((seen.back() - 2 * suspects.incoming[std::size_t(n)]) / larger(moved, 1e-30));
    }
    if (double(missing) > 0.5 * double(seen.size())) return true;
    // Routers are less sensitive in some directions, so a hundredth counts if it is above rounding.
    const LayerRules& rules = layer_rules();
    const double typical = median(ratio);
    return typical > rules.before_router ||
           (typical > rules.before_router_if_seen && median(seen) > rules.router_rounding);
  }

  const ParityPack& pack_;
  const ReferenceRecord& want_;
  const DeviceTrace& trace_;
  const Limits& limits_;
  const std::int64_t count_;
  std::vector<Values> error_;  // of every hidden state
};

Check expert_check(const LayerResult& layer, double allowed) {
  const auto text = [](double share, std::int64_t count) {
    return count ? concat(general(100 * share, 4), " % of ", count) : "none";
  };
  return at_most(concat("experts[", layer.layer, "]"),
                 concat("Layer ", layer.layer, ": positions with other experts than a near-tie explains"),
                 double(layer.severe_flips), allowed,
                 concat("same experts where the margin is clear: ", text(layer.clear, layer.clear_count),
                        " positions; at near-ties: ", text(layer.near, layer.near_count)),
                 layer.layer);
}

}  // namespace

Diagnosis diagnose(const ParityPack& pack, const DeviceTrace& trace, const Limits& limits) {
  return Examination(pack, trace, limits).run();
}

std::optional<std::vector<std::int32_t>> guilty_experts(const std::int32_t* chosen, std::int64_t k, const Mask& bad,
                                                        const Mask& good) {
  if (!count(bad) || !count(good)) return {};
  const std::size_t size = bad.size();
  const std::size_t experts = std::size_t(*std::max_element(chosen, chosen + std::int64_t(size) * k)) + 1;
  std::vector<std::int64_t> in_bad(experts), in_use(experts);
  for (std::size_t n = 0; n < size; ++n) {
    for (std::int64_t i = 0; i < k; ++i) {
      const std::size_t expert = std::size_t(chosen[std::int64_t(n) * k + i]);
      in_bad[expert] += bad[n];
      in_use[expert] += bad[n] || good[n];
    }
  }
  Mask left = bad;
  std::vector<std::int32_t> guilty;
  while (count(left)) {
    std::vector<std::int64_t> explained(experts);
    for (std::size_t n = 0; n < size; ++n) {
      for (std::int64_t i = 0; left[n] && i < k; ++i) {
        const std::size_t expert = std::size_t(chosen[std::int64_t(n) * k + i]);
        const bool suspect = in_bad[expert] > 0 &&
                             double(in_bad[expert]) >= layer_rules().suspect * double(in_use[expert]);
        explained[expert] += suspect;
      }
    }
    const auto most = std::max_element(explained.begin(), explained.end());
    if (*most == 0) return {};
    const std::int32_t worst = std::int32_t(most - explained.begin());
    guilty.push_back(worst);
    for (std::size_t n = 0; n < size; ++n) {
      const std::int32_t* own = chosen + std::int64_t(n) * k;
      if (std::find(own, own + k, worst) != own + k) left[n] = false;
    }
  }
  const std::int64_t used = std::count_if(in_use.begin(), in_use.end(), [](std::int64_t uses) { return uses > 0; });
  if (std::int64_t(guilty.size()) > std::max<std::int64_t>(2, used / 8)) return {};
  std::sort(guilty.begin(), guilty.end());
  return guilty;
}

std::vector<Check> layer_checks(const ParityPack& pack, const LogitRecord& debug, const Diagnosis& diagnosis,
                                const Limits& limits) {
  const double allowed = limits.bad_positions * double(pack.count());
  std::vector<Check> checks = {at_most("embedding", "Embedding: relative error, largest", diagnosis.embedding_error,
                                       limits.embedding_error,
                                       diagnosis.first == -1 ? diagnosis.cause.value_or("") : "")};
  for (const LayerResult& layer : diagnosis.layers) {
    std::string detail = concat("added error ", general(layer.added, 3), " (median), worst ",
                                format_number(layer.worst, 2), " times the allowed");
    if (layer.layer == diagnosis.first) {
      detail = diagnosis.cause.value_or("") + "; " + detail;
    } else if (layer.diverged) {
      detail = "its input was wrong already; " + detail;
    }
    checks.push_back(at_most(concat("layer[", layer.layer, "]"),
                             concat("Layer ", layer.layer, ": positions at which it adds an error of its own"),
                             double(layer.bad), allowed, detail, layer.layer));
    if (pack.num_experts) checks.push_back(expert_check(layer, allowed));
  }
  if (count(debug.seen)) {
    const double error = median(where(logit_errors(pack, pack.target(), debug), debug.seen));
    double last = diagnosis.layers.empty() ? diagnosis.embedding_error : diagnosis.layers.back().error;
    if (!std::isfinite(last)) last = 0;
    checks.push_back(at_most("head", "Debug graph: relative error of the log-probabilities, median", error,
                             limits.head_error + limits.layer_gain * last));
  }
  return checks;
}

}  // namespace edgelm::capi
