// The scalar reference for quantisation, one group at a time, following quant/primitives.py. Always compiled.
#include "quantize_kernel.h"

namespace edgelm {
namespace {

struct Final { float scale, zero, error; };

float Round(float value) { return (value + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23; |value| < 2^22

float Code(float x, float inverse, float low, float high) {
  float c = x * inverse;
  c = c > low ? c : low;
  c = c < high ? c : high;
  return Round(c);
}

float Reciprocal(float value) { return value == 0.0f ? 0.0f : 1.0f / value; }

float ToHalf(float scale) { return HalfToFloat(FloatToHalf(scale)) + 0.0f; }  // -0 becomes +0

float Clip(float value, float levels) { return value < 0.0f ? 0.0f : value > levels ? levels : value; }

Final Finish(const float* x, int64_t group, float scale, float zero, float levels) {
  const float inverse = Reciprocal(scale);
  float error = 0.0f;
  for (int64_t k = 0; k < group; ++k) {
    const float difference = x[k] - Code(x[k], inverse, -zero, levels - zero) * scale;
    error += difference * difference;
  }
  return {scale, zero, error};
}

Final Search(const edgelm_quantize_arguments& arguments, const float* x) {
  const edgelm_quant_matrix& m = arguments.matrix;
  const float levels = static_cast<float>((1 << m.bits) - 1), half = static_cast<float>(1 << (m.bits - 1));
  float bottom = 0.0f, top = 0.0f, largest = 0.0f;
  for (int64_t k = 0; k < m.group; ++k) {
    if (__builtin_fabsf(x[k]) > __builtin_fabsf(largest)) largest = x[k];
    bottom = x[k] < bottom ? x[k] : bottom;
    top = x[k] > top ? x[k] : top;
  }
  float extent = m.symmetric ? -largest : top - bottom;
  if (__builtin_fabsf(extent) < kTiny) extent = 0.0f;
  const float base = Reciprocal(extent);
  const float zero = m.symmetric ? half : Round(Clip(-bottom * (levels * base), levels));

  float best_score = -1.0f, best_scale = 0.0f;
  for (int t = 0; t < arguments.target_count; ++t) {
    float sxc = 0.0f, scc = 0.0f;
    for (int64_t k = 0; k < m.group; ++k) {
      const float c = Code(x[k], arguments.targets[t] * base, -zero, levels - zero);
      sxc += x[k] * c;
      scc += c * c;
    }
    const float score = sxc * sxc / scc;
    if (score > best_score) {
      best_score = score;
      best_scale = sxc / scc;
    }
  }
  const Final found = Finish(x, m.group, ToHalf(best_scale), zero, levels);
  const float plain = ToHalf(extent / (m.symmetric ? half - 1.0f : levels));
  const float plain_zero = m.symmetric ? zero : Round(Clip(-bottom * Reciprocal(plain), levels));
  const Final rounded = Finish(x, m.group, plain, plain_zero, levels);
  return found.error <= rounded.error ? found : rounded;
}

// Codes are written in ascending order, so the bits above a code in its byte are not written yet.
void Put(uint8_t* codes, int64_t at, int bits, unsigned code) {
  uint8_t* byte = codes + at * bits / 8;
  const int shift = static_cast<int>(at * bits % 8);
  byte[0] = static_cast<uint8_t>((byte[0] & ((1u << shift) - 1)) | code << shift);
  if (shift + bits > 8) byte[1] = static_cast<uint8_t>(code >> (8 - shift));
}

int Get(const uint8_t* codes, int64_t at, int bits) {
  const uint8_t* byte = codes + at * bits / 8;
  const int shift = static_cast<int>(at * bits % 8);
  const int next = shift + bits > 8 ? byte[1] : 0;
  return (byte[0] | next << 8) >> shift & ((1 << bits) - 1);
}

int64_t Quantize(const edgelm_quantize_arguments& arguments, int64_t first, int64_t last, void* scratch,
                 int32_t* status) {
  const edgelm_quant_matrix& m = arguments.matrix;
  const float levels = static_cast<float>((1 << m.bits) - 1);
  float* x = static_cast<float*>(scratch);
  for (int64_t g = first; g < last; ++g) {
    const int64_t per_row = m.columns / m.group, row = g / per_row, start = g % per_row * m.group;
    for (int64_t k = 0; k < m.group; ++k) {
      x[k] = LoadWeight(arguments, row, start + k);
      const uint32_t magnitude = Bits(x[k]) & 0x7fffffffu;
      *status = magnitude >= 0x7f800000u                      ? EDGELM_QUANT_NOT_FINITE
                : FromBits(magnitude) > LargestWeight(m.bits) ? EDGELM_QUANT_TOO_LARGE
                                                              : EDGELM_QUANT_OK;
      if (*status != EDGELM_QUANT_OK) return row * m.columns + start + k;
    }
    const Final found = Search(arguments, x);
    m.scales[g] = FloatToHalf(found.scale);
    if (!m.symmetric) m.zeros[g] = static_cast<uint8_t>(found.zero);
    const float inverse = Reciprocal(found.scale);
    for (int64_t k = 0; k < m.group; ++k) {
      const auto code = static_cast<uint8_t>(Code(x[k], inverse, -found.zero, levels - found.zero) + found.zero);
      Put(m.codes, row * m.columns + start + k, m.bits, code);
    }
  }
  return -1;
}

void Dequantize(const edgelm_dequantize_arguments& arguments, int64_t first_row, int64_t last_row) {
  const edgelm_quant_matrix& m = arguments.matrix;
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t k = 0; k < m.columns; ++k) {
      const int64_t at = row * m.columns + k, g = at / m.group;
      const int zero = m.symmetric ? 1 << (m.bits - 1) : m.zeros[g];
      const float code = static_cast<float>(Get(m.codes, at, m.bits) - zero);
      arguments.values[row * arguments.row_stride + k] = code * HalfToFloat(m.scales[g]);
    }
  }
}

#include "feedback_impl.h"

}  // namespace

const QuantizeKernel kScalarKernel = {1, Quantize, Dequantize, Fit, Feedback};

}  // namespace edgelm
