// The last step of a matmul: bias, residual, weighted sum or SwiGLU; store. Included after one of simd_*.h.
#ifndef EDGELM_KERNELS_LINEAR_FINISH_IMPL_H_
#define EDGELM_KERNELS_LINEAR_FINISH_IMPL_H_

#include "kernels/kernels.h"
#include "kernels/simd/math_impl.h"

namespace edgelm {
namespace {

// Finish `rows` rows of a unit's sums. For a SwiGLU matrix `sums` is of gate and `second` of up.
inline void FinishRows(const Matrix& m, int64_t unit, int64_t rows, const float (*sums)[kTile],
                       const float (*second)[kTile], const Output& out) {
  const int64_t first = unit * kTile, width = m.outputs() - first;
  const int64_t left = width < 16 ? width : 16;
  const int64_t right = width < 16 ? 0 : width < kTile ? width - 16 : 16;
  for (int64_t r = 0; r < rows; ++r) {
    F32 a = Load(sums[r]), b = Load(sums[r] + 16);
    switch (out.finish) {
      case Finish::kStore: {
        float* y = out.y + r * out.ldy + first;
        if (out.bias != nullptr) {
          a = Add(a, LoadPart(out.bias + first, left));
          b = Add(b, LoadPart(out.bias + first + 16, right));
        }
        if (out.residual != nullptr) {
          const float* add = out.residual + r * out.ldy + first;
          a = Add(a, LoadPart(add, left));
          b = Add(b, LoadPart(add + 16, right));
        }
        StorePart(y, a, left);
        StorePart(y + 16, b, right);
        break;
      }
      case Finish::kScatterAdd: {
        float* y = out.y + out.index[r] * out.ldy + first;
        const F32 weight = Splat(out.weight[r]);
        StorePart(y, Fma(weight, a, LoadPart(y, left)), left);
        StorePart(y + 16, Fma(weight, b, LoadPart(y + 16, right)), right);
        break;
      }
      case Finish::kSwiglu:
      case Finish::kSwigluQuant: {
        a = Mul(Silu(a), Load(second[r]));
        b = Mul(Silu(b), Load(second[r] + 16));
        if (out.finish == Finish::kSwiglu) {
          float* y = out.y + r * out.ldy + first;
          StorePart(y, a, left);
          StorePart(y + 16, b, right);
        } else {
          // Columns beyond the matrix have weights of 0, so their results are 0 too, or NaN with the rest of the row.
          const QuantRows q = out.quant.From(r);
          QuantBlock(a, b, q.codes + first, q.scales + unit, q.offsets + unit);
        }
        break;
      }
    }
  }
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_LINEAR_FINISH_IMPL_H_
