// Inner loops of GPTQ (quant/methods/gptq.py): rounding with error feedback for a block of columns and a tile of rows.
//
// These are plain loops over a tile of rows, which the compiler vectorises for each instruction set. A row's arithmetic
// does not depend on its neighbours and no multiply-add is fused, so every instruction set gives the same bits.
// Included where a kernel table is compiled, inside its anonymous namespace and after quantize_kernel.h.
#ifndef EDGELM_FEEDBACK_IMPL_H_
#define EDGELM_FEEDBACK_IMPL_H_

constexpr int kFeedbackRows = 32;

// Round `x` to the nearest integer in [low, high]. The bounds are integers below 2^22.
struct NearestInteger {
  static inline float Of(float x, float low, float high) {
    x = x < low ? low : x;
    x = x > high ? high : x;
    return (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23
  }
};

// Round `x` to the nearest FP8 number, ties to even, clamped to the largest. At or above kSmallest there are kMantissa
// bits after the leading one; below it numbers are multiples of kStep.
template <int kMantissa, uint32_t kLargest, uint32_t kSmallest, uint32_t kStep>
struct NearestFp8 {
  static inline float Of(float x, float, float) {
    const uint32_t bits = Bits(x), sign = bits & 0x80000000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    magnitude = magnitude > kLargest ? kLargest : magnitude;  // bits of floats of one sign compare as the floats do
    constexpr int kShift = 23 - kMantissa;
    const uint32_t normal = (magnitude + ((1u << (kShift - 1)) - 1) + ((magnitude >> kShift) & 1u)) &
                            ~((1u << kShift) - 1);
    // Adding a number whose unit in the last place is kStep rounds to multiples of kStep.
    const float base = FromBits(kStep + (23u << 23)) * 1.5f;
    const uint32_t subnormal = Bits((FromBits(magnitude) + base) - base);
    return FromBits((magnitude < kSmallest ? subnormal : normal) | sign);
  }
};

using NearestE4m3 = NearestFp8<3, 0x43e00000u, 0x3c800000u, 0x3b000000u>;  // 448, 2^-6, 2^-9
using NearestE5m2 = NearestFp8<2, 0x47600000u, 0x38800000u, 0x37800000u>;  // 57344, 2^-14, 2^-16

// Load a tile, column by column, from an array with `stride` floats per row. Rows beyond `count` are zero.
inline void LoadTile(const float* from, int64_t stride, int64_t columns, int count, float (*to)[kFeedbackRows]) {
  for (int64_t j = 0; j < columns; ++j) {
    if (count == kFeedbackRows) {
      memcpy(to[j], from + j * stride, sizeof to[j]);
      continue;
    }
    for (int r = 0; r < kFeedbackRows; ++r) to[j][r] = r < count ? from[j * stride + r] : 0.0f;
  }
}

inline void StoreTile(const float (*from)[kFeedbackRows], int64_t columns, int count, float* to, int64_t stride) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int r = 0; r < count; ++r) to[j * stride + r] = from[j][r];
  }
}

template <class Nearest, bool kRecode>
void FeedbackTile(const edgelm_feedback_arguments& a, int64_t first, int count) {
  alignas(64) float weights[EDGELM_FEEDBACK_COLUMNS][kFeedbackRows];
  alignas(64) float target[EDGELM_FEEDBACK_COLUMNS][kFeedbackRows];
  alignas(64) float error[EDGELM_FEEDBACK_COLUMNS][kFeedbackRows];
  alignas(64) float values[EDGELM_FEEDBACK_COLUMNS][kFeedbackRows];
  alignas(64) float scale[1][kFeedbackRows], inverse[1][kFeedbackRows], low[1][kFeedbackRows], change[kFeedbackRows];
  LoadTile(a.weights + first, a.stride, a.columns, count, weights);
  LoadTile(a.target + first, a.stride, a.columns, count, target);
  if (kRecode) LoadTile(a.error + first, a.stride, a.columns, count, error);
  LoadTile(a.scale + first, 0, 1, count, scale);
  LoadTile(a.inverse + first, 0, 1, count, inverse);
  LoadTile(a.lowest + first, 0, 1, count, low);
  for (int64_t j = 0; j < a.columns; ++j) {
    const float* coupling = a.coupling + j * a.coupling_stride;
    const float reciprocal = kRecode ? 1.0f / coupling[j] : 0.0f;
    for (int r = 0; r < kFeedbackRows; ++r) {
      const float wanted = kRecode ? (weights[j][r] - error[j][r]) + target[j][r] * reciprocal : target[j][r];
      const float value = Nearest::Of(wanted * inverse[0][r], low[0][r], low[0][r] + a.range);
      const float left = weights[j][r] - value * scale[0][r];
      change[r] = kRecode ? left - error[j][r] : left;
      values[j][r] = value;
      error[j][r] = left;
    }
    for (int64_t k = j + 1; k < a.columns; ++k) {
      const float c = coupling[k];
      for (int r = 0; r < kFeedbackRows; ++r) target[k][r] += c * change[r];
    }
  }
  StoreTile(values, a.columns, count, a.values + first, a.stride);
  StoreTile(error, a.columns, count, a.error + first, a.stride);
}

// For each row of a tile, find the best of the trial scales. Each is first refitted (least squares) to the codes it
// gives.
template <class Nearest>
void FitTile(const edgelm_fit_arguments& a, int64_t first, int count) {
  alignas(64) float low[1][kFeedbackRows], trial[1][kFeedbackRows], line[1][kFeedbackRows];
  alignas(64) float best[kFeedbackRows], found[kFeedbackRows], inverse[kFeedbackRows];
  alignas(64) float dot[kFeedbackRows], norm[kFeedbackRows], fitted[kFeedbackRows], error[kFeedbackRows];
  LoadTile(a.lowest + first, 0, 1, count, low);
  for (int r = 0; r < kFeedbackRows; ++r) {
    best[r] = __builtin_inff();
    found[r] = 0.0f;
  }
  for (int64_t t = 0; t < a.trial_count; ++t) {
    LoadTile(a.trials + t * a.rows + first, 0, 1, count, trial);
    for (int r = 0; r < kFeedbackRows; ++r) {
      inverse[r] = trial[0][r] == 0.0f ? 0.0f : 1.0f / trial[0][r];
      dot[r] = norm[r] = error[r] = 0.0f;
    }
    for (int64_t j = 0; j < a.columns; ++j) {
      const float importance = a.importance[j];
      LoadTile(a.weights + j * a.stride + first, 0, 1, count, line);
      for (int r = 0; r < kFeedbackRows; ++r) {
        const float value = Nearest::Of(line[0][r] * inverse[r], low[0][r], low[0][r] + a.range);
        dot[r] += importance * line[0][r] * value;
        norm[r] += importance * value * value;
      }
    }
    for (int r = 0; r < kFeedbackRows; ++r) fitted[r] = norm[r] > 0.0f ? dot[r] / norm[r] : 0.0f;
    if (a.half) {
      for (int r = 0; r < kFeedbackRows; ++r) fitted[r] = HalfToFloat(FloatToHalf(fitted[r]));
    }
    for (int r = 0; r < kFeedbackRows; ++r) inverse[r] = fitted[r] == 0.0f ? 0.0f : 1.0f / fitted[r];
    for (int64_t j = 0; j < a.columns; ++j) {
      const float importance = a.importance[j];
      LoadTile(a.weights + j * a.stride + first, 0, 1, count, line);
      for (int r = 0; r < kFeedbackRows; ++r) {
        const float value = Nearest::Of(line[0][r] * inverse[r], low[0][r], low[0][r] + a.range);
        const float left = line[0][r] - value * fitted[r];
        error[r] += importance * (left * left);
      }
    }
    for (int r = 0; r < kFeedbackRows; ++r) {
      // A scale beyond float16's range is infinite and its error NaN, which never compares as less.
      const bool better = error[r] < best[r];
      best[r] = better ? error[r] : best[r];
      found[r] = better ? fitted[r] : found[r];
    }
  }
  for (int r = 0; r < count; ++r) a.scale[first + r] = found[r];
}

template <class Nearest>
void FitRows(const edgelm_fit_arguments& a, int64_t first, int64_t last) {
  for (; first < last; first += kFeedbackRows) {
    FitTile<Nearest>(a, first, static_cast<int>(last - first < kFeedbackRows ? last - first : kFeedbackRows));
  }
}

// Fit rows [first, last).
void Fit(const edgelm_fit_arguments& a, int64_t first, int64_t last) {
  switch (a.numbers) {
    case EDGELM_INTEGERS: return FitRows<NearestInteger>(a, first, last);
    case EDGELM_E4M3: return FitRows<NearestE4m3>(a, first, last);
    default: return FitRows<NearestE5m2>(a, first, last);
  }
}

template <class Nearest>
void FeedbackRows(const edgelm_feedback_arguments& a, int64_t first, int64_t last) {
  for (; first < last; first += kFeedbackRows) {
    const int count = static_cast<int>(last - first < kFeedbackRows ? last - first : kFeedbackRows);
    if (a.recode) {
      FeedbackTile<Nearest, true>(a, first, count);
    } else {
      FeedbackTile<Nearest, false>(a, first, count);
    }
  }
}

// Round rows [first, last) of the block.
void Feedback(const edgelm_feedback_arguments& a, int64_t first, int64_t last) {
  switch (a.numbers) {
    case EDGELM_INTEGERS: return FeedbackRows<NearestInteger>(a, first, last);
    case EDGELM_E4M3: return FeedbackRows<NearestE4m3>(a, first, last);
    default: return FeedbackRows<NearestE5m2>(a, first, last);
  }
}

#endif  // EDGELM_FEEDBACK_IMPL_H_
