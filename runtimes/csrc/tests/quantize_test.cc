// Tests quantisation: every instruction set gives the scalar reference's bits, and the reference is correct.
#include "quantize.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "quantize_kernel.h"

namespace {

struct Case {
  int64_t rows, columns, group;
  int bits;
  bool symmetric;
};

std::string Name(const Case& c) {
  return std::to_string(c.rows) + "x" + std::to_string(c.columns) + " int" + std::to_string(c.bits) + " group " +
         std::to_string(c.group) + (c.symmetric ? " sym" : " asym");
}

std::vector<float> Targets(const Case& c) {
  // From a little less to a little more than the code of the largest weight in plain rounding, as in search_targets.
  const float half = static_cast<float>(1 << (c.bits - 1)), levels = 2.0f * half - 1.0f;
  const float low = c.symmetric ? half - 1.1f : levels - 0.8f;
  const float step = (c.symmetric ? half * 1.3f : levels * 1.3f) / (c.bits == 8 ? 256.0f : 32.0f);
  std::vector<float> targets;
  for (int i = 0; i < 11; ++i)
    targets.push_back(low + step * static_cast<float>(i));  // 11: a remainder of every unroll
  return targets;
}

struct Result {
  int32_t status = -1;
  int64_t bad_index = -1;
  std::vector<uint8_t> codes, zeros;
  std::vector<uint16_t> scales;

  edgelm_quant_matrix Matrix(const Case& c, int isa, int threads) {
    const size_t groups = static_cast<size_t>(c.rows * (c.columns / c.group));
    codes.resize(static_cast<size_t>(c.rows * c.columns * c.bits / 8), 0xAB);
    scales.resize(groups, 0xABAB);
    zeros.resize(groups, 0xAB);
    return {c.rows,      c.columns,    c.group,       c.bits,
            c.symmetric, codes.data(), scales.data(), c.symmetric ? nullptr : zeros.data(),
            threads,     isa};
  }

  bool operator==(const Result& other) const {
    return status == other.status && bad_index == other.bad_index && codes == other.codes && zeros == other.zeros &&
           scales == other.scales;
  }
};

Result Quantize(const Case& c, const void* weights, int type, int64_t stride, int isa, int threads) {
  Result result;
  const std::vector<float> targets = Targets(c);
  edgelm_quantize_arguments arguments = {};
  arguments.matrix = result.Matrix(c, isa, threads);
  arguments.weights = weights;
  arguments.row_stride = stride;
  arguments.targets = targets.data();
  arguments.target_count = static_cast<int32_t>(targets.size());
  arguments.weight_type = type;
  result.status = edgelm_quantize(&arguments);
  result.bad_index = arguments.bad_index;
  return result;
}

std::vector<float> Dequantize(const Case& c, Result& q, int isa, int threads) {
  std::vector<float> values(static_cast<size_t>(c.rows * c.columns), NAN);
  edgelm_dequantize_arguments arguments = {q.Matrix(c, isa, threads), values.data(), c.columns};
  const int32_t status = edgelm_dequantize(&arguments);
  EXPECT(status == EDGELM_QUANT_OK, "%s: status %d", Name(c).c_str(), status);
  return values;
}

std::vector<float> Weights(const Case& c, int64_t stride, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::student_t_distribution<float> heavy(3.0f);
  std::vector<float> w(static_cast<size_t>(c.rows * stride));
  for (size_t i = 0; i < w.size(); ++i) {
    w[i] = 0.02f * (seed % 2 ? normal(engine) : heavy(engine));
    if (seed % 3 == 0) w[i] = std::fabs(w[i]);     // one-sided: the zero point goes to an end
    if (seed % 5 == 0 && i / 64 % 2) w[i] = 0.0f;  // all-zero groups among others
    if (seed % 7 == 0) w[i] *= std::exp2(-0.3f * static_cast<float>(i % 100));  // scales down to float16's subnormals
  }
  return w;
}

// Squared error of one group in double, from what the kernel wrote.
double SquaredError(const float* w, const float* v, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += (double(w[i]) - v[i]) * (double(w[i]) - v[i]);
  return sum;
}

// Squared error of rounding with a float16 scale of absmax / (2^(bits-1) - 1), the textbook way.
double PlainError(const float* w, int64_t count, int bits) {
  const int most = (1 << (bits - 1)) - 1;
  float absmax = 0;
  for (int64_t i = 0; i < count; ++i) absmax = std::fmax(absmax, std::fabs(w[i]));
  const float scale = edgelm::HalfToFloat(edgelm::FloatToHalf(absmax / static_cast<float>(most)));
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double code = scale == 0 ? 0 : std::fmin(most, std::fmax(-most, std::nearbyint(double(w[i]) / scale)));
    sum += std::pow(w[i] - code * scale, 2);
  }
  return sum;
}

void TestEveryInstructionSetAgreesWithTheReference() {
  uint32_t seed = 1;
  for (const int bits : {3, 4, 5, 6, 8}) {
    for (const bool symmetric : {true, false}) {
      for (const int64_t group : {2, 8, 16, 32, 48, 64, 128}) {
        if (group * bits % 8 != 0) continue;
        for (const int64_t groups : {1, 3, 5}) {
          for (int64_t rows = 1; rows <= 17; rows += rows < 4 ? 1 : 6) {
            const Case c = {rows, group * groups, group, bits, symmetric};
            const int64_t stride = c.columns + seed % 3;
            const std::vector<float> w = Weights(c, stride, seed++);
            std::vector<uint16_t> bf16;
            std::vector<float> rounded;
            for (const float value : w) {
              bf16.push_back(static_cast<uint16_t>(edgelm::Bits(value) >> 16));
              rounded.push_back(edgelm::FromBits(uint32_t{bf16.back()} << 16));
            }
            Result reference = Quantize(c, w.data(), EDGELM_FLOAT32, stride, EDGELM_ISA_SCALAR, 1);
            EXPECT(reference.status == EDGELM_QUANT_OK, "%s", Name(c).c_str());
            const Result short_reference = Quantize(c, rounded.data(), EDGELM_FLOAT32, stride, EDGELM_ISA_SCALAR, 1);
            const std::vector<float> values = Dequantize(c, reference, EDGELM_ISA_SCALAR, 1);
            for (const int isa : {EDGELM_ISA_AUTO, EDGELM_ISA_BASELINE, EDGELM_ISA_AVX2, EDGELM_ISA_AVX512}) {
              if (!edgelm_quant_has_isa(isa)) continue;
              for (const int threads : {1, 3}) {
                EXPECT(Quantize(c, w.data(), EDGELM_FLOAT32, stride, isa, threads) == reference, "%s isa %d threads %d",
                       Name(c).c_str(), isa, threads);
                EXPECT(Quantize(c, bf16.data(), EDGELM_BFLOAT16, stride, isa, threads) == short_reference,
                       "%s isa %d threads %d from bfloat16", Name(c).c_str(), isa, threads);
                const std::vector<float> got = Dequantize(c, reference, isa, threads);
                EXPECT(std::memcmp(got.data(), values.data(), got.size() * sizeof(float)) == 0, "%s isa %d",
                       Name(c).c_str(), isa);
              }
            }
          }
        }
      }
    }
  }
}

void TestNeverWorseThanPlainRounding() {
  double found = 0, plain = 0;
  for (uint32_t seed = 1; seed < 40; ++seed) {
    const Case c = {8, 256, seed % 2 ? 32 : 128, std::vector<int>{3, 4, 5, 6, 8}[seed % 5], true};
    const std::vector<float> w = Weights(c, c.columns, seed);
    Result q = Quantize(c, w.data(), EDGELM_FLOAT32, c.columns, EDGELM_ISA_AUTO, 1);
    const std::vector<float> v = Dequantize(c, q, EDGELM_ISA_AUTO, 1);
    for (int64_t g = 0; g < c.rows * c.columns / c.group; ++g) {
      const double ours = SquaredError(&w[g * c.group], &v[g * c.group], c.group);
      const double theirs = PlainError(&w[g * c.group], c.group, c.bits);
      // Errors are compared in float32 inside the kernel, and summed over up to 128 values.
      EXPECT(ours <= theirs * (1 + 1e-5) + 1e-30, "%s group %d: %g, plain %g", Name(c).c_str(), int(g), ours, theirs);
      found += c.bits == 4 ? ours : 0;
      plain += c.bits == 4 ? theirs : 0;
    }
  }
  EXPECT(found < 0.75 * plain, "the search gains too little at 4 bits: %g, plain %g", found, plain);
}

void TestHalfConversionIsRoundToNearestEven() {
  for (uint32_t half = 0; half < 0x7c00; ++half) {
    const float value = edgelm::HalfToFloat(static_cast<uint16_t>(half));
    const double expected = half < 1024 ? half * std::exp2(-24.0)
                                        : (1024 + half % 1024) * std::exp2(static_cast<int>(half / 1024) - 25);
    EXPECT(value == expected, "half %04x is %g, not %g", half, value, expected);
    EXPECT(edgelm::FloatToHalf(value) == half, "half %04x", half);
    EXPECT(edgelm::FloatToHalf(-value) == (half | 0x8000), "half -%04x", half);
    if (half + 1 == 0x7c00) break;
    const float next = edgelm::HalfToFloat(static_cast<uint16_t>(half + 1)), middle = (value + next) / 2;
    EXPECT(edgelm::FloatToHalf(middle) == half + half % 2, "the tie above %04x", half);
    EXPECT(edgelm::FloatToHalf(std::nextafter(middle, 0.0f)) == half, "below the tie above %04x", half);
    EXPECT(edgelm::FloatToHalf(std::nextafter(middle, 1e9f)) == half + 1, "past the tie above %04x", half);
  }
  EXPECT(edgelm::FloatToHalf(65519.99f) == 0x7bff, "the largest finite");
  EXPECT(edgelm::FloatToHalf(65520.0f) == 0x7c00, "the least infinite");
  EXPECT(edgelm::FloatToHalf(1e30f) == 0x7c00, "overflow");
  EXPECT(std::isnan(edgelm::HalfToFloat(edgelm::FloatToHalf(NAN))), "NaN");
}

void TestTheFirstDamagedWeightIsNamed() {
  const Case c = {40, 128, 32, 4, true};
  const std::vector<float> good = Weights(c, c.columns, 1);
  const float infinity = std::numeric_limits<float>::infinity();
  for (const int isa : {EDGELM_ISA_SCALAR, EDGELM_ISA_BASELINE, EDGELM_ISA_AVX2, EDGELM_ISA_AVX512}) {
    if (!edgelm_quant_has_isa(isa)) continue;
    for (const int64_t at : {int64_t{0}, int64_t{31}, int64_t{2077}, c.rows * c.columns - 1}) {
      for (const float value : {NAN, infinity, -infinity, 7.001f * 65504}) {
        std::vector<float> w = good;
        w[at] = value;
        if (at + 1000 < int64_t(w.size())) w[at + 1000] = NAN;
        const Result r = Quantize(c, w.data(), EDGELM_FLOAT32, c.columns, isa, 2);
        EXPECT(r.bad_index == at, "isa %d: %g at %d reported at %d", isa, value, int(at), int(r.bad_index));
        EXPECT(r.status == (std::isfinite(value) ? EDGELM_QUANT_TOO_LARGE : EDGELM_QUANT_NOT_FINITE), "isa %d: %g", isa,
               value);
      }
    }
    std::vector<float> w = good;
    w[5] = -7 * 65504.0f;
    Result r = Quantize(c, w.data(), EDGELM_FLOAT32, c.columns, isa, 1);
    EXPECT(r.status == EDGELM_QUANT_OK, "isa %d: the largest weight there may be", isa);
    EXPECT(std::isfinite(edgelm::HalfToFloat(r.scales[0])), "isa %d: its scale", isa);
  }
}

void TestZeroGroupsAreExactlyZero() {
  for (const bool symmetric : {true, false}) {
    const Case c = {3, 64, 32, 4, symmetric};
    for (const float value : {0.0f, -0.0f, 1e-9f, -1e-45f}) {
      const std::vector<float> w(static_cast<size_t>(c.rows * c.columns), value);
      Result q = Quantize(c, w.data(), EDGELM_FLOAT32, c.columns, EDGELM_ISA_AUTO, 1);
      EXPECT(q.status == EDGELM_QUANT_OK, "%g", value);
      for (const uint16_t scale : q.scales) EXPECT(scale == 0, "scale %04x of zeros", scale);
      for (const float v : Dequantize(c, q, EDGELM_ISA_AUTO, 1)) EXPECT(v == 0.0f, "%g of %g", v, value);
    }
  }
}

void TestWrongArgumentsAreRefused() {
  const Case good = {2, 64, 32, 4, true};
  const std::vector<float> w = Weights(good, 64, 1);
  for (const Case& c :
       {Case{2, 64, 48, 4, true}, Case{2, 64, 0, 4, true}, Case{2, 64, 32, 7, true}, Case{2, 64, 32, 2, true},
        Case{2, 0, 32, 4, true}, Case{-1, 64, 32, 4, true}, Case{2, 64, 4, 3, true}, Case{2, 64, 4, 5, true},
        Case{2, 64, 2, 6, true}, Case{2, 64, 1, 4, true}}) {
    Result r;
    const std::vector<float> targets = Targets(good);
    edgelm_quantize_arguments arguments = {};
    arguments.matrix = r.Matrix(good, EDGELM_ISA_AUTO, 1);
    arguments.matrix.rows = c.rows;
    arguments.matrix.columns = c.columns;
    arguments.matrix.group = c.group;
    arguments.matrix.bits = c.bits;
    arguments.weights = w.data();
    arguments.row_stride = 64;
    arguments.targets = targets.data();
    arguments.target_count = 11;
    EXPECT(edgelm_quantize(&arguments) == EDGELM_QUANT_BAD_ARGUMENT, "%s", Name(c).c_str());
  }
  EXPECT(Quantize(good, w.data(), EDGELM_FLOAT32, 63, EDGELM_ISA_AUTO, 1).status == EDGELM_QUANT_BAD_ARGUMENT,
         "stride");
  EXPECT(Quantize(good, w.data(), 7, 64, EDGELM_ISA_AUTO, 1).status == EDGELM_QUANT_BAD_ARGUMENT, "type");
  EXPECT(Quantize(good, w.data(), EDGELM_FLOAT32, 64, EDGELM_ISA_AUTO, 0).status == EDGELM_QUANT_BAD_ARGUMENT,
         "threads");
  EXPECT(Quantize(good, w.data(), EDGELM_FLOAT32, 64, 99, 1).status == EDGELM_QUANT_NO_SUCH_ISA, "isa");
}

}  // namespace

int main() {
  TestHalfConversionIsRoundToNearestEven();
  TestEveryInstructionSetAgreesWithTheReference();
  TestNeverWorseThanPlainRounding();
  TestTheFirstDamagedWeightIsNamed();
  TestZeroGroupsAreExactlyZero();
  TestWrongArgumentsAreRefused();
  return edgelm_test::Finish();
}
