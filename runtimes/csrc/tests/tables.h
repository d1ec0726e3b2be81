// Shared by the tests of kernels: the tables that run here, comparison of bits, and guarded outputs.
#ifndef EDGELM_TESTS_TABLES_H_
#define EDGELM_TESTS_TABLES_H_

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu.h"
#include "kernels/kernels.h"
#include "check.h"

#if defined(EDGELM_TEST_EVEX)
namespace edgelm {
extern const Kernels kAvx2EvexKernels;  // avx2-vnni in AVX-512's encoding
}
#endif

namespace edgelm_test {

constexpr double kUnit = 0x1p-24;  // float32's unit roundoff

// Every table except scalar that this CPU can run. Prints once which are left out.
inline const std::vector<const edgelm::Kernels*>& FastTables() {
  static const std::vector<const edgelm::Kernels*> tables = [] {
    std::vector<const edgelm::Kernels*> found;
    for (const edgelm::InstructionSet& set : edgelm::InstructionSets()) {
      std::printf("%s: %s\n", set.kernels->name, set.available() ? "tested" : set.missing.c_str());
      if (set.available() && set.kernels != &edgelm::kScalarKernels) found.push_back(set.kernels);
#if defined(EDGELM_TEST_EVEX)
      if (!set.available() || set.kernels != &edgelm::kAvx512VnniKernels) continue;
      std::printf("%s: tested\n", edgelm::kAvx2EvexKernels.name);
      found.push_back(&edgelm::kAvx2EvexKernels);
#endif
    }
    return found;
  }();
  return tables;
}

// Whether the bits are equal. All NaN count as equal, since sign and payload depend on the order of operands.
inline bool SameFloat(float a, float b) { return std::memcmp(&a, &b, 4) == 0 || (std::isnan(a) && std::isnan(b)); }

// The first index at which two arrays differ, or -1.
inline int64_t Differs(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!SameFloat(a[i], b[i])) return static_cast<int64_t>(i);
  }
  return -1;
}

inline void ExpectSame(const std::vector<float>& got, const std::vector<float>& wanted, const std::string& what) {
  const int64_t at = Differs(got, wanted);
  EXPECT(at < 0, "%s: element %lld is %.9g, not %.9g", what.c_str(), static_cast<long long>(at),
         static_cast<double>(got[static_cast<size_t>(at)]), static_cast<double>(wanted[static_cast<size_t>(at)]));
}

// The element furthest outside its tolerance. NaN is always outside.
struct Worst {
  double excess = 0, got = 0, wanted = 0, tolerance = 0;
  int64_t at = -1;

  void Add(int64_t index, double value, double expected, double allowed) {
    const double error = std::fabs(value - expected);
    if (error <= allowed) return;
    const double over = std::isnan(error) ? INFINITY : error / (allowed + 1e-300);
    if (at < 0 || over > excess) *this = {over, value, expected, allowed, index};
  }
  void Expect(const std::string& what) const {
    EXPECT(at < 0, "%s: element %lld is %.9g, not %.9g +- %.3g", what.c_str(), static_cast<long long>(at), got, wanted,
           tolerance);
  }
};

inline std::vector<float> RandomRows(int64_t count, uint32_t seed, float deviation = 1.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> x(static_cast<size_t>(count));
  for (float& value : x) value = normal(engine);
  return x;
}

// Quantised rows and their memory, filled with values that no kernel writes.
struct QuantBuffer {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> offsets;
  int64_t columns = 0;

  QuantBuffer(int64_t rows, int64_t width) : columns((width + 31) / 32 * 32) {
    codes.assign(static_cast<size_t>(rows * columns), -128);
    scales.assign(static_cast<size_t>(rows * columns / 32), -1.0f);
    offsets.assign(static_cast<size_t>(rows * columns / 32), 12345);
  }
  edgelm::QuantRows Rows() { return {codes.data(), scales.data(), offsets.data(), columns}; }
  void ExpectSame(const QuantBuffer& other, const std::string& what) const {
    EXPECT(codes == other.codes, "%s: codes", what.c_str());
    EXPECT(offsets == other.offsets, "%s: offsets", what.c_str());
    edgelm_test::ExpectSame(scales, other.scales, what + ": scales");
  }
};

}  // namespace edgelm_test

#endif  // EDGELM_TESTS_TABLES_H_
