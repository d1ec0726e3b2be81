// Random +-1 projections of hidden states to 64 numbers. As edgelm/parity/sketch.py, which says why.
#pragma once

#include <cstdint>
#include <vector>

namespace edgelm::capi {

class Sketcher {
 public:
  Sketcher(std::int64_t width, std::uint64_t seed);
  // The sketch [64] of a hidden state [width]. Sums are in double, so that their order does not show.
  void sketch(const float* hidden, float* result) const;

 private:
  std::size_t width_;
  std::vector<double> signs_;  // [width, 64]
};

}  // namespace edgelm::capi
