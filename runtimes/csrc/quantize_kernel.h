// The part of the quantisation kernel that is compiled once for each instruction set.
#ifndef EDGELM_QUANTIZE_KERNEL_H_
#define EDGELM_QUANTIZE_KERNEL_H_

#include <stdint.h>
#include <string.h>

#include "quantize.h"

namespace edgelm {

struct QuantizeKernel {
  // Groups processed together, one per vector lane.
  int lanes;
  // Quantise the groups [first, last) of the matrix, counted row by row. `scratch` holds (4 + 1) * lanes * group bytes,
  // 64-byte aligned. Returns -1, or the index of a weight at or before which an error occurred, and sets the status.
  int64_t (*quantize)(const edgelm_quantize_arguments& arguments, int64_t first, int64_t last, void* scratch,
                      int32_t* status);
  void (*dequantize)(const edgelm_dequantize_arguments& arguments, int64_t first_row, int64_t last_row);
  void (*fit)(const edgelm_fit_arguments& arguments, int64_t first_row, int64_t last_row);
  void (*feedback)(const edgelm_feedback_arguments& arguments, int64_t first_row, int64_t last_row);
};

extern const QuantizeKernel kScalarKernel;
extern const QuantizeKernel kBaselineKernel;
#if defined(EDGELM_X86)
extern const QuantizeKernel kAvx2Kernel;
extern const QuantizeKernel kAvx512Kernel;
#endif

// A group whose largest magnitude is below this is all zeros: its scale is far below float16's smallest, 2^-24.
constexpr float kTiny = 0x1p-40f;
constexpr float kHalfMax = 65504.0f;

static inline uint32_t Bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float FromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest, ties to even, subnormals included; infinite above 65519.99.
static inline uint16_t FloatToHalf(float value) {
  uint32_t bits = Bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits >= 0x47800000u) return static_cast<uint16_t>(sign | (bits > 0x7f800000u ? 0x7e00u : 0x7c00u));
  if (bits < 0x38800000u) {
    // 0.5 has the unit in the last place 2^-24, that of a subnormal half, so the addition rounds correctly.
    return static_cast<uint16_t>(sign | (Bits(FromBits(bits) + 0.5f) - 0x3f000000u));
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);  // exponent bias 127 -> 15, and half a unit for rounding
  return static_cast<uint16_t>(sign | (bits >> 13));
}

static inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u, mantissa = half & 1023u;
  if (exponent == 0) return FromBits(sign | Bits(static_cast<float>(mantissa) * 0x1p-24f));
  if (exponent == 31) return FromBits(sign | 0x7f800000u | (mantissa << 13));
  return FromBits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

static inline float LoadWeight(const edgelm_quantize_arguments& arguments, int64_t row, int64_t column) {
  const int64_t at = row * arguments.row_stride + column;
  if (arguments.weight_type == EDGELM_FLOAT32) return static_cast<const float*>(arguments.weights)[at];
  return FromBits(static_cast<uint32_t>(static_cast<const uint16_t*>(arguments.weights)[at]) << 16);
}

// The largest magnitude whose scale fits float16, for symmetric and asymmetric schemes.
static inline float LargestWeight(int bits) { return kHalfMax * static_cast<float>((1 << (bits - 1)) - 1); }

}  // namespace edgelm

#endif  // EDGELM_QUANTIZE_KERNEL_H_
