// Kernels over rows of activations: quantisation to int8, RMSNorm, softmax. Included after one of simd_*.h.
#ifndef EDGELM_KERNELS_ROWS_IMPL_H_
#define EDGELM_KERNELS_ROWS_IMPL_H_

#include "kernels.h"
#include "kernels/simd/math_impl.h"

namespace edgelm {
namespace {

void QuantizeRows(const float* x, int64_t ldx, int64_t rows, int64_t columns, const QuantRows& out) {
  for (int64_t r = 0; r < rows; ++r) {
    const QuantRows to = out.From(r);
    const float* from = x + r * ldx;
    for (int64_t block = 0; block < out.blocks(); ++block) {
      const int64_t left = columns - block * kBlock;
      const int64_t first = left < 16 ? left : 16, second = left < 16 ? 0 : left < 32 ? left - 16 : 16;
      const F32 a = LoadPart(from + block * kBlock, first), b = LoadPart(from + block * kBlock + 16, second);
      QuantBlock(a, b, to.codes + block * kBlock, to.scales + block, to.offsets + block);
    }
  }
}

void RmsNorm(const float* x, int64_t ldx, int64_t rows, int64_t columns, const float* weight, float eps, float* y,
             int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = x + r * ldx;
    float* to = y + r * ldy;
    F32 squares = Splat(0.0f);
    for (int64_t i = 0; i < columns; i += 16) {
      const F32 a = LoadPart(from + i, columns - i < 16 ? columns - i : 16);
      squares = Fma(a, a, squares);
    }
    const float mean = Sum(squares) / static_cast<float>(columns);
    const F32 factor = Splat(1.0f / __builtin_sqrtf(mean + eps));
    for (int64_t i = 0; i < columns; i += 16) {
      const int64_t count = columns - i < 16 ? columns - i : 16;
      StorePart(to + i, Mul(Mul(LoadPart(from + i, count), factor), LoadPart(weight + i, count)), count);
    }
  }
}

void Softmax(float* x, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r, x += columns) {
    F32 top = Splat(-INFINITY);
    bool nan = false;
    for (int64_t i = 0; i < columns; ++i) nan |= __builtin_isnan(x[i]);
    for (int64_t i = 0; i < columns; i += 16) {
      const int64_t count = columns - i < 16 ? columns - i : 16;
      F32 a = LoadPart(x + i, count);
      if (count < 16) {  // the unused lanes hold 0, which could be the largest
        float lanes[16];
        for (int l = 0; l < 16; ++l) lanes[l] = l < count ? x[i + l] : -INFINITY;
        a = Load(lanes);
      }
      top = Max(top, a);
    }
    const F32 most = nan ? Splat(NAN) : Splat(Largest(top));
    F32 sum = Splat(0.0f);
    for (int64_t i = 0; i < columns; i += 16) {
      const int64_t count = columns - i < 16 ? columns - i : 16;
      StorePart(x + i, Exp(Sub(LoadPart(x + i, count), most)), count);
      sum = Add(sum, LoadPart(x + i, count));
    }
    const F32 total = Splat(Sum(sum));
    for (int64_t i = 0; i < columns; i += 16) {
      const int64_t count = columns - i < 16 ? columns - i : 16;
      StorePart(x + i, Div(LoadPart(x + i, count), total), count);
    }
  }
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_ROWS_IMPL_H_
