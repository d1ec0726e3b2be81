// Interface of the CPU kernels: raw pointers in and out, no allocation, no threads, independent of ONNX Runtime.
//
// There is one table of functions per instruction set, compiled from the same templates over `simd_*.h`. All tables
// give the same bits: sums are taken in one fixed order (16 lanes, then halves added to halves), every a * b + c is one
// fused operation, and exponentials are one polynomial. So a bundle's results do not depend on the machine that runs
// it, and each table is tested against the scalar one without a tolerance.
//
// The caller divides the work: a function computes the tiles or rows that it is given, and its results depend on
// nothing else. So they do not depend on the number of threads.
#ifndef EDGELM_KERNELS_KERNELS_H_
#define EDGELM_KERNELS_KERNELS_H_

#include <cstdint>

#include "kernels/attention/attention.h"
#include "layout.h"

namespace edgelm {

// Rows of activations in int8, with one scale per block of 32: x ~ codes * scales. A block with a value that is not
// finite has a scale of NaN, which makes the results of its row NaN, and of no other row.
struct QuantRows {
  int8_t* codes = nullptr;     // [rows, columns rounded up to 32]
  float* scales = nullptr;     // [rows, blocks]
  int32_t* offsets = nullptr;  // [rows, blocks]: -8 times the sum of the codes, the contribution of int4's zero point
  int64_t columns = 0;         // codes per row, a multiple of 32

  EDGELM_INLINE int64_t blocks() const { return columns / kBlock; }
  EDGELM_INLINE QuantRows From(int64_t row) const {
    return {codes + row * columns, scales + row * blocks(), offsets + row * blocks(), columns};
  }
};

enum class Finish {
  kStore,        // y[r, n] = x W^T, + bias[n] if given, + residual[r, n] if given
  kScatterAdd,   // y[index[r], n] += weight[r] * x W^T: the weighted sum of an MoE layer
  kSwiglu,       // y[r, n] = silu(gate) * up
  kSwigluQuant,  // the same, quantised into `quant` (a tile's 32 columns are a block)
};

// What a matmul does with its results. `y` has `ldy` floats per row.
struct Output {
  Finish finish = Finish::kStore;
  float* y = nullptr;
  int64_t ldy = 0;
  const float* bias = nullptr;      // [outputs]
  const float* residual = nullptr;  // same row stride as y
  const int32_t* index = nullptr;
  const float* weight = nullptr;
  QuantRows quant;

  // The same for rows from `row` on.
  EDGELM_INLINE Output From(int64_t row) const {
    Output out = *this;
    if (finish != Finish::kScatterAdd && y != nullptr) out.y += row * ldy;
    if (residual != nullptr) out.residual += row * ldy;
    if (index != nullptr) out.index += row;
    if (weight != nullptr) out.weight += row;
    if (quant.codes != nullptr) out.quant = quant.From(row);
    return out;
  }
};

struct LinearKernels {
  // x [rows, columns] with `ldx` floats per row, to int8. If `columns` is not a multiple of 32, zeros follow.
  void (*quantize_rows)(const float* x, int64_t ldx, int64_t rows, int64_t columns, const QuantRows& out);
  // y = x / sqrt(mean(x^2) + eps) * weight, row by row (Zhang & Sennrich 2019, arXiv 1910.07467). y may be x.
  void (*rms_norm)(const float* x, int64_t ldx, int64_t rows, int64_t columns, const float* weight, float eps, float* y,
                   int64_t ldy);
  // Units [begin, end) of an integer matrix times rows of int8 activations.
  void (*linear_int8)(const Matrix& matrix, int64_t begin, int64_t end, const QuantRows& x, int64_t rows,
                      const Output& out);
  // For kInt8Split: the same from the high nibbles alone; the unread low nibbles count as 8, their middle.
  void (*linear_high)(const Matrix& matrix, int64_t begin, int64_t end, const QuantRows& x, int64_t rows,
                      const Output& out);
  // Units [begin, end) of any matrix times rows of float32 activations [rows, columns].
  void (*linear_float)(const Matrix& matrix, int64_t begin, int64_t end, const float* x, int64_t ldx, int64_t rows,
                       const Output& out);
  // Softmax over `columns`, in place, row by row (the maximum is subtracted first).
  void (*softmax)(float* x, int64_t rows, int64_t columns);
};

// One instruction set's kernels.
struct Kernels {
  const char* name;  // as EDGELM_ISA spells it
  LinearKernels linear;
  AttentionKernels attention;
};

extern const Kernels kScalarKernels;
#if defined(EDGELM_X86)
extern const Kernels kAvx2Kernels, kAvx2VnniKernels, kAvx512VnniKernels;
#elif defined(EDGELM_ARM64)
extern const Kernels kNeonDotKernels, kNeonI8mmKernels;
#endif

}  // namespace edgelm

#endif  // EDGELM_KERNELS_KERNELS_H_
