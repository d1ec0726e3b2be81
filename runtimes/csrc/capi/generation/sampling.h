// Sampling: choose the next token from the logits, as edgelm/generation/sampling.py, with the same results: the order of
// the filters, ties, sums, and the draw are Python's. tests/vectors/sampling.json holds cases that both have to give.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "capi/generation/random.h"

namespace edgelm::capi {

struct Sampling {
  double temperature = 0;         // 0: greedy decoding
  std::int64_t top_k = 0;         // 0: all
  double top_p = 1, min_p = 0;    // all
  double repetition_penalty = 1;  // none
  std::optional<std::uint64_t> seed;

  // Throws Error(EDGELM_INVALID_ARGUMENT) if a value is out of range, or does nothing with temperature 0.
  void check() const;
  bool greedy() const { return temperature == 0; }
  // Greedy, and nothing changes the logits.
  bool plain() const { return greedy() && repetition_penalty == 1; }
};

// The token with the highest of logits [size]; of equal ones the first. Throws Error(EDGELM_RUNTIME) if it is not finite.
std::int32_t argmax(const float* logits, std::int64_t size);

// The next token by logits [size]. `seen`: the distinct tokens that the repetition penalty applies to; `uniform`: a
// random number in [0, 1), not used if greedy.
std::int32_t choose(const float* logits, std::int64_t size, const Sampling& options,
                    const std::vector<std::int32_t>& seen, double uniform);

// Chooses the tokens of one sequence.
class Sampler {
 public:
  // `seen`: the prompt's ids, each less than `size`, for the repetition penalty.
  Sampler(const Sampling& options, const std::vector<std::int32_t>& seen, std::int64_t size);

  // Choose a token and count it for the repetition penalty. Throws as `argmax`.
  std::int32_t sample(const float* logits);
  const Sampling& options() const { return options_; }

 private:
  void count(std::int32_t token);

  Sampling options_;
  std::int64_t size_;
  Pcg64 random_;
  std::vector<std::int32_t> seen_;
  std::vector<bool> occurs_;
};

}  // namespace edgelm::capi
