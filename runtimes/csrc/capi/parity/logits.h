// The logits on the device against the references': their distances, and the checks that hold them to the limits. As
// edgelm/parity/logits.py.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "capi/parity/limits/limits.h"
#include "capi/parity/pack/pack.h"
#include "capi/parity/result.h"
#include "capi/parity/numbers/statistics.h"

namespace edgelm::capi {

using Rows = std::vector<std::int64_t>;

// The device's logits at the recorded tokens of each position; NaN for positions that were not run.
class LogitRecord : public LogitValues {
 public:
  explicit LogitRecord(const ParityPack& pack);

  // Store logits [rows, vocab] of the positions from `first` on; return the next position.
  std::int64_t put(std::int64_t first, const float* logits, std::int64_t rows, std::int64_t vocab);

  Mask seen;

 private:
  const ParityPack& pack_;
  const std::vector<std::int32_t> next_ids_;
};

// KL(p || q) in nats of row i of p and row j of q, over the `top` recorded tokens and one bucket for all others: a lower
// bound of the true KL.
double bucketed_kl(const LogitValues& p, std::size_t i, const LogitValues& q, std::size_t j, std::int64_t top);
// RMS difference of the log-probabilities of row i and row j at the recorded tokens and probes, relative to the standard
// deviation of the expected ones; over the `likely` most probable columns only, if given.
double logit_error(const LogitValues& expected, std::size_t i, const LogitValues& actual, std::size_t j,
                   const ParityPack& pack, std::optional<std::int64_t> likely = {});

// The same at every position, or at those of `rows`.
Values divergence(const ParityPack& pack, const LogitValues& expected, const LogitValues& actual,
                  const Rows* rows = nullptr);
Values logit_errors(const ParityPack& pack, const LogitValues& expected, const LogitValues& actual,
                    const Rows* rows = nullptr, std::optional<std::int64_t> likely = {});

// Share of equal entries, under `mask` if it is given; NaN without entries.
double agreement(const std::vector<std::int64_t>& expected, const std::vector<std::int64_t>& actual,
                 const Mask* mask = nullptr);
// exp of the mean of -log p(next token) over the positions `mask`; NaN without positions.
double perplexity(const LogitValues& values, const Mask& mask);
// Where the reference's lead is at least `gap`.
Mask clear_positions(const ReferenceRecord& record, double gap);

// How far a device follows a greedy continuation.
struct GreedyResult { std::int64_t total, prefix, clear_differences; };
// Compare `steps` token choices.
GreedyResult greedy_prefix(const std::int64_t* expected, const std::int64_t* actual, const float* gap,
                           std::int64_t steps, double near_tie);
// One for each prompt, against the target.
std::vector<GreedyResult> greedy_results(const ParityPack& pack, const LogitValues& device, const Limits& limits);

std::vector<Check> logit_checks(const ParityPack& pack, const LogitRecord& device, const Limits& limits);
std::vector<Check> greedy_checks(const ParityPack& pack, const LogitRecord& device, const Limits& limits);
FloatLoss float_loss(const ParityPack& pack, const LogitValues& device, const std::string& kind);

}  // namespace edgelm::capi
