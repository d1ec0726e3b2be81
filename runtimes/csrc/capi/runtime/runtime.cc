#include "capi/runtime/runtime.h"

#include <algorithm>
#include <cmath>

#include "capi/runtime/checks.h"

namespace edgelm::capi {
namespace {

constexpr std::int64_t kLogitsBytes = 64 << 20;

}  // namespace

const float* Runtime::prefill(const std::vector<std::int32_t>& ids) {
  check_fits(ids.data(), ids.size());
  const float* logits = nullptr;
  const std::int64_t total = std::int64_t(ids.size());
  for (std::int64_t begin = 0; begin < total; begin += chunk) {
    check_cancelled();
    const std::int64_t count = std::min(chunk, total - begin);
    logits = prefill_step(ids.data() + begin, count, begin + count == total);
    position_ += count;
  }
  return logits;
}

std::int32_t Runtime::decode_greedy(std::int32_t token) {
  const float* logits = decode(token);
  // As NumPy's argmax: the first NaN if there is one.
  std::int64_t best = 0;
  for (std::int64_t i = 0; i < vocab_size; ++i) {
    if (logits[i] > logits[best]) best = i;
    if (std::isnan(logits[i])) {
      best = i;
      break;
    }
  }
  if (!std::isfinite(logits[best])) {
    const char* value = std::isnan(logits[best]) ? "nan" : logits[best] > 0 ? "inf" : "-inf";
    fail(
        EDGELM_RUNTIME, "the model's highest logit is ", value,
        ": the bundle is damaged or its runtime is at fault; check with `edgelm inspect --verify` and `edgelm parity`");
  }
  return std::int32_t(best);
}

void Runtime::logits_all(const std::vector<std::int32_t>& ids,
                         const std::function<void(const float* logits, std::int64_t rows)>& block) {
  check_fits(ids.data(), ids.size());
  const std::int64_t most = std::max<std::int64_t>(1, std::min(chunk, kLogitsBytes / (4 * vocab_size)));
  const std::int64_t total = std::int64_t(ids.size());
  for (std::int64_t begin = 0; begin < total; begin += most) {
    check_cancelled();
    const std::int64_t count = std::min(most, total - begin);
    const float* logits = prefill_all(ids.data() + begin, count);
    position_ += count;
    block(logits, count);
  }
}

void Runtime::truncate(std::int64_t length) {
  if (length < 0 || length > position_) {
    fail(EDGELM_INVALID_ARGUMENT, "cannot keep ", length, " cached tokens: give 0 to ", position_,
         ", the number that is cached");
  }
  position_ = length;
}

void Runtime::check_fits(const std::int32_t* ids, std::size_t count) const {
  check_tokens(ids, count, vocab_size);
  check_room(count, position_, context_length, model_context_length);
}

void Runtime::check_cancelled() const {
  if (cancelled_) fail(EDGELM_CANCELLED, "the call was cancelled");
}

}  // namespace edgelm::capi
