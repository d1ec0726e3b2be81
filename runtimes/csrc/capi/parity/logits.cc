#include "capi/parity/logits.h"

#include <algorithm>
#include <numeric>

#include "capi/common/error.h"
#include "capi/parity/numbers/format.h"

namespace edgelm::capi {
namespace {

constexpr float kNoFloat = std::numeric_limits<float>::quiet_NaN();

std::string where_largest(const ParityPack& pack, const Values& values) {
  const auto missing = std::count_if(values.begin(), values.end(), [](double value) { return std::isnan(value); });
  if (missing) return concat(missing, " positions have logits that are NaN");
  const std::int64_t worst = std::max_element(values.begin(), values.end()) - values.begin();
  for (const GoldenPrompt& prompt : pack.prompts) {
    if (worst < prompt.start + prompt.fed()) {
      return concat("at token ", worst - prompt.start, " of the prompt ", python_quoted(prompt.name));
    }
  }
  return "";
}

Check top1_check(const ReferenceRecord& want, const LogitRecord& device, const Mask& clear, const Limits& limits) {
  const std::string title = "Most likely token as the quantised reference's, where that is clear";
  const double everywhere = agreement(want.best, device.best);
  const std::string detail = concat(count(clear), " of ", clear.size(), " positions are clear; over all positions ",
                                    general(100 * everywhere, 4), " % agree");
  if (!count(clear)) return {"logits.top1", title, {}, "no position has a clear first choice; " + detail};
  return at_least("logits.top1", title, agreement(want.best, device.best, &clear), limits.top1_clear, detail);
}

// The positions that choose the tokens of the continuations.
Rows greedy_rows(const ParityPack& pack) {
  Rows rows;
  for (const GoldenPrompt& prompt : pack.prompts) {
    for (std::int64_t i = 0; i < prompt.steps(); ++i) rows.push_back(prompt.first_greedy() + i);
  }
  return rows;
}

// How many tokens of the float reference's continuations the device chooses up to the first difference.
std::int64_t float_prefix(const ParityPack& pack, const LogitRecord& device) {
  std::int64_t same = 0;
  for (const GoldenPrompt& prompt : pack.prompts) {
    const std::vector<std::int64_t> greedy(prompt.greedy.begin(), prompt.greedy.end());
    const std::size_t first = std::size_t(prompt.first_greedy());
    same += greedy_prefix(greedy.data(), device.best.data() + first, pack.target().gap.data() + first, prompt.steps(),
                          0)
                .prefix;
  }
  return same;
}

}  // namespace

LogitRecord::LogitRecord(const ParityPack& pack) : pack_(pack), next_ids_(pack.next_ids()) {
  const std::size_t count = std::size_t(pack.count());
  top_logits.assign(count * std::size_t(pack.top), kNoFloat);
  probe_logits.assign(count * std::size_t(pack.probes()), kNoFloat);
  next_logit.assign(count, kNoFloat);
  logsumexp.assign(count, kNan);
  best.assign(count, -1);
  seen.assign(count, false);
}

std::int64_t LogitRecord::put(std::int64_t first, const float* logits, std::int64_t rows, std::int64_t vocab) {
  const std::size_t top = std::size_t(pack_.top), probes = std::size_t(pack_.probes());
  for (std::size_t row = std::size_t(first); row < std::size_t(first + rows); ++row, logits += vocab) {
    for (std::size_t i = 0; i < top; ++i) top_logits[row * top + i] = logits[pack_.top_ids[row * top + i]];
    for (std::size_t i = 0; i < probes; ++i) probe_logits[row * probes + i] = logits[pack_.probe_ids[i]];
    next_logit[row] = logits[next_ids_[row]];
    // As numpy's argmax and max: the first NaN is the largest.
    std::int64_t largest = 0;
    for (std::int64_t i = 0; i < vocab && !std::isnan(logits[largest]); ++i) {
      if (!(logits[i] <= logits[largest])) largest = i;
    }
    const double peak = logits[largest];
    double total = 0;
    for (std::int64_t i = 0; i < vocab; ++i) total += std::exp(double(logits[i]) - peak);
    logsumexp[row] = std::log(total) + peak;
    best[row] = largest;
    seen[row] = true;
  }
  return first + rows;
}

double bucketed_kl(const LogitValues& p, std::size_t i, const LogitValues& q, std::size_t j, std::int64_t top) {
  const float *of_p = p.top_logits.data() + i * std::size_t(top), *of_q = q.top_logits.data() + j * std::size_t(top);
  double sum = 0, mass_p = 0, mass_q = 0;
  for (std::int64_t token = 0; token < top; ++token) {
    const double log_p = of_p[token] - p.logsumexp[i], log_q = of_q[token] - q.logsumexp[j];
    const double share = std::exp(log_p);
    mass_p += share;
    mass_q += std::exp(log_q);
    sum += share * (log_p - log_q);
  }
  // A float32 log-sum may put the recorded mass a few 1e-7 above one; a bucket below that is noise, not a zero.
  const double rest_p = std::clamp(1 - mass_p, 0.0, 1.0), rest_q = std::clamp(1 - mass_q, 1e-7, 1.0);
  if (rest_p > 1e-7) sum += rest_p * (std::log(rest_p) - std::log(rest_q));
  return larger(sum, 0);
}

double logit_error(const LogitValues& expected, std::size_t i, const LogitValues& actual, std::size_t j,
                   const ParityPack& pack, std::optional<std::int64_t> likely) {
  const std::size_t top = std::size_t(pack.top), probes = std::size_t(pack.probes());
  Values want, squares;
  const auto add = [&](float a, float b) {
    want.push_back(a - expected.logsumexp[i]);
    const double difference = want.back() - (b - actual.logsumexp[j]);
    squares.push_back(difference * difference);
  };
  for (std::size_t n = 0; n < top; ++n) add(expected.top_logits[i * top + n], actual.top_logits[j * top + n]);
  for (std::size_t n = 0; n < probes; ++n) {
    add(expected.probe_logits[i * probes + n], actual.probe_logits[j * probes + n]);
  }
  const double spread = std::max(deviation(want), 1e-12);
  if (likely && std::size_t(*likely) < squares.size()) {
    std::vector<std::size_t> order(squares.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return want[a] > want[b]; });
    Values chosen;
    for (std::int64_t n = 0; n < *likely; ++n) chosen.push_back(squares[order[std::size_t(n)]]);
    squares = std::move(chosen);
  }
  return std::sqrt(mean(squares)) / spread;
}

Values divergence(const ParityPack& pack, const LogitValues& expected, const LogitValues& actual, const Rows* rows) {
  Values result;
  const std::size_t size = rows ? rows->size() : std::size_t(pack.count());
  for (std::size_t n = 0; n < size; ++n) {
    const std::size_t row = rows ? std::size_t((*rows)[n]) : n;
    result.push_back(bucketed_kl(expected, row, actual, row, pack.top));
  }
  return result;
}

Values logit_errors(const ParityPack& pack, const LogitValues& expected, const LogitValues& actual, const Rows* rows,
                    std::optional<std::int64_t> likely) {
  Values result;
  const std::size_t size = rows ? rows->size() : std::size_t(pack.count());
  for (std::size_t n = 0; n < size; ++n) {
    const std::size_t row = rows ? std::size_t((*rows)[n]) : n;
    result.push_back(logit_error(expected, row, actual, row, pack, likely));
  }
  return result;
}

double agreement(const std::vector<std::int64_t>& expected, const std::vector<std::int64_t>& actual, const Mask* mask) {
  Mask same;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (!mask || (*mask)[i]) same.push_back(expected[i] == actual[i]);
  }
  return share(same);
}

double perplexity(const LogitValues& values, const Mask& mask) {
  Values loss;
  for (std::size_t i = 0; i < mask.size(); ++i) {
    if (mask[i]) loss.push_back(values.logsumexp[i] - values.next_logit[i]);
  }
  return std::exp(mean(loss));
}

Mask clear_positions(const ReferenceRecord& record, double gap) {
  Mask clear;
  // In float32, as numpy compares them.
  for (const float lead : record.gap) clear.push_back(lead >= float(gap));
  return clear;
}

GreedyResult greedy_prefix(const std::int64_t* expected, const std::int64_t* actual, const float* gap,
                           std::int64_t steps, double near_tie) {
  GreedyResult result = {steps, steps, 0};
  for (std::int64_t i = 0; i < steps; ++i) {
    if (expected[i] == actual[i]) continue;
    result.prefix = std::min(result.prefix, i);
    result.clear_differences += double(gap[i]) >= near_tie;
  }
  return result;
}

std::vector<GreedyResult> greedy_results(const ParityPack& pack, const LogitValues& device, const Limits& limits) {
  const ReferenceRecord& want = pack.target();
  std::vector<GreedyResult> results;
  for (const GoldenPrompt& prompt : pack.prompts) {
    const std::size_t first = std::size_t(prompt.first_greedy());
    results.push_back(greedy_prefix(want.best.data() + first, device.best.data() + first, want.gap.data() + first,
                                    prompt.steps(), limits.clear_gap));
  }
  return results;
}

std::vector<Check> logit_checks(const ParityPack& pack, const LogitRecord& device, const Limits& limits) {
  const ReferenceRecord& want = pack.target();
  const Values kl = divergence(pack, want, device), error = logit_errors(pack, want, device);
  const Mask text = pack.has_next();
  const std::string own = "KL(quantised reference || device), ";
  const std::string relative = "Log-probabilities: relative error against the quantised reference, ";
  std::vector<Check> checks = {
      at_most("logits.kl_mean", own + "mean, nats", mean(kl), limits.kl_mean),
      at_most("logits.kl_p99", own + "99th percentile, nats", quantile(kl, 0.99), limits.kl_p99),
      at_most("logits.kl_max", own + "largest, nats", largest(kl), limits.kl_max, where_largest(pack, kl)),
      at_most("logits.error", relative + "median", median(error), limits.logit_error),
      at_most("logits.error_p90", relative + "90th percentile", quantile(error, 0.9), limits.logit_error_p90),
      top1_check(want, device, clear_positions(want, limits.clear_gap), limits),
  };
  if (!count(text)) {
    checks.push_back({"perplexity", "Perplexity", {}, "every prompt is a single token"});
    return checks;
  }
  const double found = perplexity(device, text), expected = perplexity(want, text);
  checks.push_back(at_most("perplexity.device", "Perplexity of the prompts: |device / quantised reference - 1|",
                           std::abs(found / expected - 1), limits.perplexity,
                           concat("quantised reference ", general(expected, 4), ", device ", general(found, 4))));
  return checks;
}

std::vector<Check> greedy_checks(const ParityPack& pack, const LogitRecord& device, const Limits& limits) {
  const Rows rows = greedy_rows(pack);
  if (rows.empty()) return {{"greedy", "Greedy continuation", {}, "the pack has no greedy continuations"}};
  const std::vector<GreedyResult> results = greedy_results(pack, device, limits);
  std::int64_t clear = 0, same = 0, total = 0;
  std::string places;
  for (std::size_t i = 0; i < results.size(); ++i) {
    clear += results[i].clear_differences;
    same += results[i].prefix;
    total += results[i].total;
    if (results[i].clear_differences) places += (places.empty() ? "" : ", ") + python_quoted(pack.prompts[i].name);
  }
  std::string detail = concat(same, " of ", total, " tokens as the quantised reference up to the first difference, ",
                              float_prefix(pack, device), " as the float");
  if (clear) detail = concat("they are in ", places, "; ", detail);
  const Values kl = divergence(pack, pack.target(), device, &rows);
  return {
      at_most("greedy.tokens", "Greedy continuation, token by token through the cache: clear choices that differ",
              double(clear), limits.greedy_clear, detail),
      at_most(
          "greedy.error",
          "Log-probabilities of likely tokens while decoding: relative error against the quantised reference, median",
          median(logit_errors(pack, pack.target(), device, &rows, likely_tokens())), limits.decode_error),
      at_most("greedy.kl", "KL(quantised reference || device) while decoding, largest, nats", largest(kl),
              limits.kl_max, concat(rows.size(), " steps fed with the float reference's tokens")),
  };
}

FloatLoss float_loss(const ParityPack& pack, const LogitValues& device, const std::string& kind) {
  if (!pack.quantized && kind != "none") return {false, kNan, kNan, kNan, kNan, {}};
  const Mask text = pack.has_next();
  const double of_float = perplexity(pack.reference, text), of_recipe = perplexity(pack.target(), text);
  const double kl = mean(divergence(pack, pack.reference, device));
  const double rise = perplexity(device, text) / of_float - 1;
  const LossWarning large = loss_warning(kind);
  std::string over;
  if (!(kl < large.kl)) {
    over = concat("the mean KL to the float model is ", general(kl, 3), " nats, large from ", general(large.kl), " on");
  }
  if (count(text) && !(rise < large.perplexity)) {
    over += concat(over.empty() ? "" : " and ", "the perplexity is ", general_signed(100 * rise, 3), " %, large from ",
                   general_signed(100 * large.perplexity, 6), " % on");
  }
  FloatLoss loss = {true, kl, mean(divergence(pack, pack.reference, pack.target())), rise, of_recipe / of_float - 1,
                    {}};
  if (!over.empty()) loss.warning = concat(over, " for ", kind);
  return loss;
}

}  // namespace edgelm::capi
