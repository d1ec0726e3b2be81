// The vector kernel for quantisation. Compiled once per instruction set, with EDGELM_KERNEL and EDGELM_LANES set by the
// build.
//
// Each lane holds one group, so that sums over a group do not cross lanes: only the transposition of the weights
// depends on the vector width, and every width gives the same bits. Do not include headers with inline functions of
// external linkage here: the linker would keep one copy of those, compiled for any one of the instruction sets.
#include "quantize_kernel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace edgelm {
namespace {

constexpr int kLanes = EDGELM_LANES;
// Trial scales per pass over a group: enough independent sums to hide the latency of additions.
constexpr int kTrials = kLanes == 16 ? 4 : 2;

typedef float Vec __attribute__((vector_size(4 * EDGELM_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * EDGELM_LANES)));

inline Vec Splat(float value) { return value - Vec{}; }

// The compiler must not turn `a < b ? a : b` into a minimum, because of NaN and -0. No NaN gets here, so this may.
inline Vec Min(Vec a, Vec b) {
#if EDGELM_LANES == 16
  return _mm512_min_ps(a, b);
#elif EDGELM_LANES == 8
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline Vec Max(Vec a, Vec b) {
#if EDGELM_LANES == 16
  return _mm512_max_ps(a, b);
#elif EDGELM_LANES == 8
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vec Round(Vec value) { return (value + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23; |value| < 2^22

inline Vec Code(Vec x, Vec inverse, Vec low, Vec high) { return Round(Min(Max(x * inverse, low), high)); }

inline Vec Reciprocal(Vec value) { return value == 0.0f ? Splat(0.0f) : 1.0f / value; }

inline Vec ToHalf(Vec scale) {
  for (int lane = 0; lane < kLanes; ++lane) scale[lane] = HalfToFloat(FloatToHalf(scale[lane]));
  return scale + 0.0f;  // -0 becomes +0
}

struct Final { Vec scale, zero, error; };

inline Final Finish(const Vec* x, int64_t group, Vec scale, Vec zero, Vec levels) {
  const Vec inverse = Reciprocal(scale), low = -zero, high = levels - zero;
  Vec error = {};
  for (int64_t k = 0; k < group; ++k) {
    const Vec difference = x[k] - Code(x[k], inverse, low, high) * scale;
    error += difference * difference;
  }
  return {scale, zero, error};
}

struct Best { Vec score, scale; };

template <int kCount>
inline void Try(const Vec* x, int64_t group, const float* targets, Vec base, Vec low, Vec high, Best* best) {
  Vec inverse[kCount], sxc[kCount], scc[kCount];
  for (int t = 0; t < kCount; ++t) {
    inverse[t] = targets[t] * base;
    sxc[t] = scc[t] = Vec{};
  }
  for (int64_t k = 0; k < group; ++k) {
    const Vec value = x[k];
#pragma GCC unroll 4
    for (int t = 0; t < kCount; ++t) {
      const Vec c = Code(value, inverse[t], low, high);
      sxc[t] += value * c;
      scc[t] += c * c;
    }
  }
  for (int t = 0; t < kCount; ++t) {
    const Vec score = sxc[t] * sxc[t] / scc[t];
    const Ints better = score > best->score;
    best->score = better ? score : best->score;
    best->scale = better ? sxc[t] / scc[t] : best->scale;
  }
}

// Result of one pass over the values: the value of largest magnitude (the first of equals), minimum and maximum with 0.
struct Extremes { Vec largest, bottom, top; };

inline Extremes Scan(const Vec* x, int64_t group) {
  Extremes e = {};
  Vec magnitude = {};
  for (int64_t k = 0; k < group; ++k) {
    const Vec m = Max(x[k], -x[k]);
    const Ints larger = m > magnitude;
    magnitude = larger ? m : magnitude;
    e.largest = larger ? x[k] : e.largest;
    e.bottom = Min(x[k], e.bottom);
    e.top = Max(x[k], e.top);
  }
  return e;
}

inline Final Search(const edgelm_quantize_arguments& arguments, const Vec* x) {
  const edgelm_quant_matrix& m = arguments.matrix;
  const Vec levels = Splat(static_cast<float>((1 << m.bits) - 1)), half = Splat(static_cast<float>(1 << (m.bits - 1)));
  const Extremes e = Scan(x, m.group);
  Vec extent = m.symmetric ? -e.largest : e.top - e.bottom;
  extent = Max(extent, -extent) < kTiny ? Splat(0.0f) : extent;
  const Vec base = Reciprocal(extent);
  const Vec zero = m.symmetric ? half : Round(Min(Max(-e.bottom * (levels * base), Splat(0.0f)), levels));

  Best best = {Splat(-1.0f), Vec{}};
  int t = 0;
  for (; t + kTrials <= arguments.target_count; t += kTrials) {
    Try<kTrials>(x, m.group, arguments.targets + t, base, -zero, levels - zero, &best);
  }
  for (; t < arguments.target_count; ++t) {
    Try<1>(x, m.group, arguments.targets + t, base, -zero, levels - zero, &best);
  }
  const Final found = Finish(x, m.group, ToHalf(best.scale), zero, levels);
  const Vec plain = ToHalf(extent / (m.symmetric ? half - 1.0f : levels));
  const Vec plain_zero = m.symmetric ? zero : Round(Min(Max(-e.bottom * Reciprocal(plain), Splat(0.0f)), levels));
  const Final rounded = Finish(x, m.group, plain, plain_zero, levels);
  const Ints keep = found.error <= rounded.error;
  return {keep ? found.scale : rounded.scale, keep ? found.zero : rounded.zero, found.error};
}

// Copy up to kLanes groups so that lane l of x[k] is value k of group first + l; lanes without a group are zero.
// Returns the largest magnitude as bits: magnitudes of floats compare as integers, with infinities and NaN above all
// others.
uint32_t Transpose(const edgelm_quantize_arguments& arguments, int64_t first, int count, float* x) {
  const edgelm_quant_matrix& m = arguments.matrix;
  const int64_t group = m.group, per_row = m.columns / group;
  uint32_t* out = reinterpret_cast<uint32_t*>(x);
  if (count < kLanes) memset(x, 0, sizeof(float) * static_cast<size_t>(group * kLanes));
  for (int lane = 0; lane < count; ++lane) {
    const int64_t g = first + lane, at = g / per_row * arguments.row_stride + g % per_row * group;
    if (arguments.weight_type == EDGELM_FLOAT32) {
      const float* from = static_cast<const float*>(arguments.weights) + at;
      for (int64_t k = 0; k < group; ++k) out[k * kLanes + lane] = Bits(from[k]);
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(arguments.weights) + at;
      for (int64_t k = 0; k < group; ++k) out[k * kLanes + lane] = static_cast<uint32_t>(from[k]) << 16;
    }
  }
  uint32_t largest = 0;
  for (int64_t i = 0; i < group * kLanes; ++i) {
    const uint32_t magnitude = out[i] & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

int64_t FindRefused(const edgelm_quantize_arguments& arguments, int64_t first, int count, int32_t* status) {
  const edgelm_quant_matrix& m = arguments.matrix;
  const int64_t per_row = m.columns / m.group;
  for (int64_t i = first * m.group; i < (first + count) * m.group; ++i) {
    const int64_t g = i / m.group, row = g / per_row, column = g % per_row * m.group + i % m.group;
    const uint32_t magnitude = Bits(LoadWeight(arguments, row, column)) & 0x7fffffffu;
    *status = magnitude >= 0x7f800000u ? EDGELM_QUANT_NOT_FINITE : EDGELM_QUANT_TOO_LARGE;
    if (magnitude >= 0x7f800000u || FromBits(magnitude) > LargestWeight(m.bits)) return row * m.columns + column;
  }
  __builtin_unreachable();  // the caller found such a magnitude among these weights
}

// The smallest number of codes that fill whole bytes: 8 codes in 3 bytes at 3 bits, 2 in 1 at 4, 8 in 5 at 5, 4 in 3 at
// 6, 1 at 8.
constexpr int CodesOfWord(int bits) { return bits % 8 == 0 ? 1 : bits % 4 == 0 ? 2 : bits % 2 == 0 ? 4 : 8; }

// Store one group's codes, which Quantize writes kLanes apart.
template <int kBits>
void StoreGroup(const uint8_t* from, int64_t group, uint8_t* to) {
  constexpr int kCodes = CodesOfWord(kBits), kBytes = kCodes * kBits / 8;
  for (int64_t k = 0; k < group; k += kCodes, to += kBytes) {
    uint64_t word = 0;
    for (int i = 0; i < kCodes; ++i) word |= static_cast<uint64_t>(from[(k + i) * kLanes]) << (kBits * i);
    for (int i = 0; i < kBytes; ++i) to[i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

void Store(const edgelm_quant_matrix& m, int64_t first, int count, const uint8_t* codes) {
  const auto store = m.bits == 3   ? StoreGroup<3>
                     : m.bits == 4 ? StoreGroup<4>
                     : m.bits == 5 ? StoreGroup<5>
                     : m.bits == 6 ? StoreGroup<6>
                                   : StoreGroup<8>;
  for (int lane = 0; lane < count; ++lane) {
    store(codes + lane, m.group, m.codes + (first + lane) * (m.group * m.bits / 8));
  }
}

int64_t Quantize(const edgelm_quantize_arguments& arguments, int64_t first, int64_t last, void* scratch,
                 int32_t* status) {
  const edgelm_quant_matrix& m = arguments.matrix;
  const Vec levels = Splat(static_cast<float>((1 << m.bits) - 1));
  Vec* x = static_cast<Vec*>(scratch);
  uint8_t* codes = static_cast<uint8_t*>(scratch) + sizeof(Vec) * static_cast<size_t>(m.group);
  const uint32_t limit = Bits(LargestWeight(m.bits));
  for (int64_t g = first; g < last; g += kLanes) {
    const int count = static_cast<int>(last - g < kLanes ? last - g : kLanes);
    if (Transpose(arguments, g, count, reinterpret_cast<float*>(x)) > limit) {
      return FindRefused(arguments, g, count, status);
    }
    const Final found = Search(arguments, x);
    for (int lane = 0; lane < count; ++lane) {
      m.scales[g + lane] = FloatToHalf(found.scale[lane]);
      if (!m.symmetric) m.zeros[g + lane] = static_cast<uint8_t>(found.zero[lane]);
    }
    const Vec inverse = Reciprocal(found.scale), low = -found.zero, high = levels - found.zero;
    for (int64_t k = 0; k < m.group; ++k) {
      const Ints code = __builtin_convertvector(Code(x[k], inverse, low, high) + found.zero, Ints);
      for (int lane = 0; lane < kLanes; ++lane) codes[k * kLanes + lane] = static_cast<uint8_t>(code[lane]);
    }
    Store(m, g, count, codes);
  }
  return -1;
}

template <int kBits>
void LoadGroup(const uint8_t* from, int64_t group, int zero, float scale, float* out) {
  constexpr int kCodes = CodesOfWord(kBits), kBytes = kCodes * kBits / 8;
  for (int64_t k = 0; k < group; k += kCodes, from += kBytes) {
    uint64_t word = 0;
    for (int i = 0; i < kBytes; ++i) word |= static_cast<uint64_t>(from[i]) << (8 * i);
    for (int i = 0; i < kCodes; ++i) {
      const int code = static_cast<int>(word >> (kBits * i)) & ((1 << kBits) - 1);
      out[k + i] = static_cast<float>(code - zero) * scale;
    }
  }
}

void Dequantize(const edgelm_dequantize_arguments& arguments, int64_t first_row, int64_t last_row) {
  const edgelm_quant_matrix& m = arguments.matrix;
  const int64_t group = m.group, per_row = m.columns / group, bytes = group * m.bits / 8;
  const auto load = m.bits == 3   ? LoadGroup<3>
                    : m.bits == 4 ? LoadGroup<4>
                    : m.bits == 5 ? LoadGroup<5>
                    : m.bits == 6 ? LoadGroup<6>
                                  : LoadGroup<8>;
  for (int64_t g = first_row * per_row; g < last_row * per_row; ++g) {
    const int zero = m.symmetric ? 1 << (m.bits - 1) : m.zeros[g];
    float* out = arguments.values + g / per_row * arguments.row_stride + g % per_row * group;
    load(m.codes + g * bytes, group, zero, HalfToFloat(m.scales[g]), out);
  }
}

#include "feedback_impl.h"

}  // namespace

extern const QuantizeKernel EDGELM_KERNEL;  // without `extern` a constant is local to its file
const QuantizeKernel EDGELM_KERNEL = {kLanes, Quantize, Dequantize, Fit, Feedback};

}  // namespace edgelm
