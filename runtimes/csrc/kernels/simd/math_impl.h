// Elementwise functions: exp, SiLU, quantisation of a block. The same operations in the same order on every instruction
// set. Included after one of simd_*.h.
#ifndef EDGELM_KERNELS_MATH_IMPL_H_
#define EDGELM_KERNELS_MATH_IMPL_H_

namespace edgelm {
namespace {

// e^x to 2 units in the last place for x in [-87.3, 88.3], clamped outside; NaN stays NaN.
// Cody & Waite's reduction x = n ln 2 + r with ln 2 in two parts, then Taylor's polynomial of degree 6 on |r| <= ln 2 / 2.
inline F32 Exp(F32 x) {
  x = Max(Splat(-87.3f), Min(Splat(88.3f), x));
  const I32 n = Round(Mul(x, Splat(1.44269504f)));
  const F32 nf = ToFloat(n);
  F32 r = Fma(nf, Splat(-0.693359375f), x);
  r = Fma(nf, Splat(2.12194440e-4f), r);
  F32 p = Splat(1.0f / 720.0f);
  p = Fma(p, r, Splat(1.0f / 120.0f));
  p = Fma(p, r, Splat(1.0f / 24.0f));
  p = Fma(p, r, Splat(1.0f / 6.0f));
  p = Fma(p, r, Splat(0.5f));
  p = Fma(p, r, Splat(1.0f));
  p = Fma(p, r, Splat(1.0f));
  return AsFloat(AddI(AsInt(p), ShiftLeftI<23>(n)));
}

// x * sigmoid(x)
inline F32 Silu(F32 x) { return Div(x, Add(Splat(1.0f), Exp(Sub(Splat(0.0f), x)))); }

// Quantise a block of 32 activations to int8: codes = round(x * 127 / max|x|). Blocks below 2^-100 count as zero (the
// inverse of their scale would overflow).
inline void QuantBlock(F32 a, F32 b, int8_t* codes, float* scale, int32_t* offset) {
  // 0 * x is NaN for infinities and NaN; Max alone would drop a NaN.
  const F32 odd = Fma(a, Splat(0.0f), Mul(b, Splat(0.0f)));
  const float probe = Sum(odd);
  const float largest = Largest(Max(Abs(a), Abs(b)));
  if (!(probe == 0.0f) || largest < 0x1p-100f) {
    std::memset(codes, 0, 32);
    *scale = probe == 0.0f ? 0.0f : probe - probe;
    *offset = 0;
    return;
  }
  const F32 inverse = Splat(127.0f / largest);
  const I32 qa = Round(Mul(a, inverse)), qb = Round(Mul(b, inverse));
  StoreBytes(codes, qa);
  StoreBytes(codes + 16, qb);
  *scale = largest / 127.0f;
  *offset = -8 * SumI(AddI(qa, qb));
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_MATH_IMPL_H_
