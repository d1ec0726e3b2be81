#include "capi/parity/device/sketch.h"

#include "capi/parity/pack/pack.h"

namespace edgelm::capi {

Sketcher::Sketcher(std::int64_t width, std::uint64_t seed) : width_(std::size_t(width)) {
  signs_.reserve(width_ * kSketchWidth);
  for (std::size_t d = 0; d < width_; ++d) {
    // splitmix64, as its authors published it.
    seed += 0x9E3779B97F4A7C15u;
    std::uint64_t z = seed;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    for (int j = 0; j < kSketchWidth; ++j) signs_.push_back(double((z >> j) & 1) * 2 - 1);
  }
}

void Sketcher::sketch(const float* hidden, float* result) const {
  double sums[kSketchWidth] = {};
  const double* signs = signs_.data();
  for (std::size_t d = 0; d < width_; ++d, signs += kSketchWidth) {
    const double value = hidden[d];
    for (int j = 0; j < kSketchWidth; ++j) sums[j] += value * signs[j];
  }
  for (int j = 0; j < kSketchWidth; ++j) result[j] = float(sums[j]);
}

}  // namespace edgelm::capi
