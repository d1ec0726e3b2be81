// Integer dot products of a block on Arm. linear_int8_impl.h includes this inside its namespaces in place of its own
// versions. Four columns of an activation row come from a lane of a register; with FEAT_I8MM several rows use int8
// matrix multiply instructions.
#ifndef EDGELM_KERNELS_NEON_DOT_IMPL_H_
#define EDGELM_KERNELS_NEON_DOT_IMPL_H_

#define EDGELM_FLATTEN inline __attribute__((always_inline))

// Rows of activations per pass over a tile.
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kIntRows = 8;
#else
constexpr int kIntRows = kRowTile;
#endif

template <int kQuad, typename Vector>
EDGELM_FLATTEN auto& Quad(Vector& x) {
  if constexpr (kQuad == 0) return x.a;
  else if constexpr (kQuad == 1) return x.b;
  else if constexpr (kQuad == 2) return x.c;
  else return x.d;
}

// -- one column of lanes at a time -------------------------------------------------------------------------------------

template <int kLane>
EDGELM_FLATTEN int32x4_t DotLane(int32x4_t acc, uint8x16_t codes, int8x16_t x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return vusdotq_laneq_s32(acc, codes, x, kLane);
#else
  return vdotq_laneq_s32(acc, vreinterpretq_s8_u8(codes), x, kLane);
#endif
}

// Add the dot products of columns 4 kQ .. 4 kQ + 3; x[r] holds columns 16 (kQ / 4) .. of row r.
template <Kind kKind, int kRows, int kVec, int kQ>
EDGELM_FLATTEN void DotFour(const uint8_t* codes, const uint8_t* low, int half, const int8x16_t (&x)[kRows],
                            I32 (&c)[kRows][kVec]) {
#pragma GCC unroll 2
  for (int v = 0; v < kVec; ++v) {
    B8 four = FourColumns<kKind, kQ>(codes, low, half + v);
    if constexpr (kDotFullSigned && IsFull(kKind)) {
      const uint8x16_t flip = vdupq_n_u8(0x80);
      four = {veorq_u8(four.a, flip), veorq_u8(four.b, flip), veorq_u8(four.c, flip), veorq_u8(four.d, flip)};
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      I32& sum = c[r][v];
      sum = {DotLane<kQ % 4>(sum.a, four.a, x[r]), DotLane<kQ % 4>(sum.b, four.b, x[r]),
             DotLane<kQ % 4>(sum.c, four.c, x[r]), DotLane<kQ % 4>(sum.d, four.d, x[r])};
    }
  }
}

template <Kind kKind, int kRows, int kVec>
EDGELM_FLATTEN void DotLanes(const uint8_t* codes, const uint8_t* low, int half, const int8_t* x, int64_t stride,
                             I32 (&c)[kRows][kVec], I32 (&more)[kRows][kVec]) {
  int8x16_t rows[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) rows[r] = vld1q_s8(x + r * stride);
  auto& other = kRows == 1 ? more : c;
  DotFour<kKind, kRows, kVec, 0>(codes, low, half, rows, c);
  DotFour<kKind, kRows, kVec, 1>(codes, low, half, rows, other);
  DotFour<kKind, kRows, kVec, 2>(codes, low, half, rows, c);
  DotFour<kKind, kRows, kVec, 3>(codes, low, half, rows, other);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) rows[r] = vld1q_s8(x + r * stride + 16);
  DotFour<kKind, kRows, kVec, 4>(codes, low, half, rows, c);
  DotFour<kKind, kRows, kVec, 5>(codes, low, half, rows, other);
  DotFour<kKind, kRows, kVec, 6>(codes, low, half, rows, c);
  DotFour<kKind, kRows, kVec, 7>(codes, low, half, rows, other);
}

// Add the dot products of 16 columns of a block, the first or the second.
template <Kind kKind, int kRows, int kVec, int kWhich>
EDGELM_FLATTEN void DotHalf(const uint8_t* codes, const uint8_t* low, int half, const int8_t* x, int64_t stride,
                            I32 (&c)[kRows][kVec], I32 (&more)[kRows][kVec]) {
  int8x16_t rows[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) rows[r] = vld1q_s8(x + r * stride + 16 * kWhich);
  auto& other = kRows == 1 ? more : c;
  DotFour<kKind, kRows, kVec, 4 * kWhich>(codes, low, half, rows, c);
  DotFour<kKind, kRows, kVec, 4 * kWhich + 1>(codes, low, half, rows, other);
  DotFour<kKind, kRows, kVec, 4 * kWhich + 2>(codes, low, half, rows, c);
  DotFour<kKind, kRows, kVec, 4 * kWhich + 3>(codes, low, half, rows, other);
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
// -- SMMLA, USMMLA: two rows by two columns of eight at a time
// ---------------------------------------------------------

// Four rows of the tile by 16 columns, as the matrix multiply instruction takes them: two rows (`front`, then `back`)
// by eight columns. Which eight does not matter as long as the activations have the same: here 4-column units 0 and 2
// of the 16 are `even`, 1 and 3 `odd`, so that nibbles are separated after rows are joined, half as often.
struct Sixteen { uint8x16_t even_front, even_back, odd_front, odd_back; };

EDGELM_FLATTEN uint8x16_t Front(uint8x16_t x, uint8x16_t y) {
  return vreinterpretq_u8_u32(vzip1q_u32(vreinterpretq_u32_u8(x), vreinterpretq_u32_u8(y)));
}
EDGELM_FLATTEN uint8x16_t Back(uint8x16_t x, uint8x16_t y) {
  return vreinterpretq_u8_u32(vzip2q_u32(vreinterpretq_u32_u8(x), vreinterpretq_u32_u8(y)));
}

// `at`: offset of the four rows in 128 bytes of codes. `half`: which 16 of the block's columns.
EDGELM_FLATTEN Sixteen SplitNibbles(const uint8_t* codes, int64_t at, int half) {
  const uint8x16_t x = vld1q_u8(codes + 256 * half + at), y = vld1q_u8(codes + 256 * half + 128 + at);
  const uint8x16_t front = Front(x, y), back = Back(x, y);
  return {LowNibblesOf(front), LowNibblesOf(back), HighNibblesOf(front), HighNibblesOf(back)};
}

template <Kind kKind, int kHalf>
EDGELM_FLATTEN Sixteen SixteenColumns(const uint8_t* codes, const uint8_t* low, int64_t at) {
  constexpr int kQ = 4 * kHalf;
  if constexpr (kKind == Kind::kInt8 || kKind == Kind::kInt3 || kKind == Kind::kInt5 || kKind == Kind::kInt6) {
    uint8x16_t four[4];
    if constexpr (kKind == Kind::kInt8) {
      for (int i = 0; i < 4; ++i) four[i] = vld1q_u8(codes + 128 * (kQ + i) + at);
    } else if constexpr (kKind == Kind::kInt3) {
      const uint8x16_t pairs = vld1q_u8(codes + 128 * kHalf + at), thirds = vld1q_u8(codes + 256 + at);
      four[0] = JoinBitsOf<0, 2, kQ, 1>(pairs, thirds);
      four[1] = JoinBitsOf<2, 2, kQ + 1, 1>(pairs, thirds);
      four[2] = JoinBitsOf<4, 2, kQ + 2, 1>(pairs, thirds);
      four[3] = JoinBitsOf<6, 2, kQ + 3, 1>(pairs, thirds);
    } else {
      const uint8x16_t x = vld1q_u8(codes + 256 * kHalf + at), y = vld1q_u8(codes + 256 * kHalf + 128 + at);
      constexpr bool kFive = kKind == Kind::kInt5;
      constexpr int kBits = kFive ? 1 : 2, kAt = kFive ? kQ : 0;
      const uint8x16_t high = vld1q_u8(codes + 512 + (kFive ? 0 : 128 * kHalf) + at);
      four[0] = JoinBitsOf<0, 4, kAt, kBits>(x, high);
      four[1] = JoinBitsOf<4, 4, kAt + kBits, kBits>(x, high);
      four[2] = JoinBitsOf<0, 4, kAt + 2 * kBits, kBits>(y, high);
      four[3] = JoinBitsOf<4, 4, kAt + 3 * kBits, kBits>(y, high);
    }
    return {Front(four[0], four[2]), Back(four[0], four[2]), Front(four[1], four[3]), Back(four[1], four[3])};
  } else {
    const Sixteen high_nibbles = SplitNibbles(codes, at, kHalf);
    if constexpr (kKind != Kind::kInt8Split) return high_nibbles;
    const Sixteen low_nibbles = SplitNibbles(low, at, kHalf);
    return {JoinNibblesOf(high_nibbles.even_front, low_nibbles.even_front),
            JoinNibblesOf(high_nibbles.even_back, low_nibbles.even_back),
            JoinNibblesOf(high_nibbles.odd_front, low_nibbles.odd_front),
            JoinNibblesOf(high_nibbles.odd_back, low_nibbles.odd_back)};
  }
}

// Eight rows of the tile, quads kQuad and kQuad + 1 of vector v, by 16 columns of all activation rows. The lanes of an
// instruction's result are (row of the tile, row of x): 00, 01, 10, 11. An odd last row of x is paired with itself.
template <Kind kKind, int kRows, int kHalf>
EDGELM_FLATTEN void MultiplySixteen(const uint8_t* codes, const uint8_t* low, int64_t at, const int8_t* x,
                                    int64_t stride, int32x4_t (&sums)[(kRows + 1) / 2][4]) {
  const Sixteen first = SixteenColumns<kKind, kHalf>(codes, low, at);
  const Sixteen second = SixteenColumns<kKind, kHalf>(codes, low, at + 16);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r += 2) {
    const int8_t* row = x + r * stride + 16 * kHalf;
    const int32x4_t top = vreinterpretq_s32_s8(vld1q_s8(row));
    const int32x4_t bottom = r + 1 < kRows ? vreinterpretq_s32_s8(vld1q_s8(row + stride)) : top;
    const int8x16_t even = vreinterpretq_s8_s32(vuzp1q_s32(top, bottom));
    const int8x16_t odd = vreinterpretq_s8_s32(vuzp2q_s32(top, bottom));
    int32x4_t(&s)[4] = sums[r / 2];
    s[0] = vusmmlaq_s32(vusmmlaq_s32(s[0], first.even_front, even), first.odd_front, odd);
    s[1] = vusmmlaq_s32(vusmmlaq_s32(s[1], first.even_back, even), first.odd_back, odd);
    s[2] = vusmmlaq_s32(vusmmlaq_s32(s[2], second.even_front, even), second.odd_front, odd);
    s[3] = vusmmlaq_s32(vusmmlaq_s32(s[3], second.even_back, even), second.odd_back, odd);
  }
}

template <Kind kKind, int kRows, int kVec, int kQuad>
EDGELM_FLATTEN void MultiplyEight(const uint8_t* codes, const uint8_t* low, int64_t at, const int8_t* x, int64_t stride,
                                  int v, I32 (&c)[kRows][kVec]) {
  int32x4_t sums[(kRows + 1) / 2][4];
#pragma GCC unroll 4
  for (int pair = 0; pair < (kRows + 1) / 2; ++pair)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[pair][i] = vdupq_n_s32(0);
  MultiplySixteen<kKind, kRows, 0>(codes, low, at + 16 * kQuad, x, stride, sums);
  MultiplySixteen<kKind, kRows, 1>(codes, low, at + 16 * kQuad, x, stride, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    int32x4_t(&s)[4] = sums[r / 2];
    int32x4_t &left = Quad<kQuad>(c[r][v]), &right = Quad<kQuad + 1>(c[r][v]);
    left = vaddq_s32(left, r % 2 == 0 ? vuzp1q_s32(s[0], s[1]) : vuzp2q_s32(s[0], s[1]));
    right = vaddq_s32(right, r % 2 == 0 ? vuzp1q_s32(s[2], s[3]) : vuzp2q_s32(s[2], s[3]));
  }
}
#endif

// As in linear_int8_impl.h.
template <Kind kKind, int kRows, int kVec>
EDGELM_FLATTEN void DotBlock(const uint8_t* codes, const uint8_t* low, int half, const int8_t* x, int64_t stride,
                             I32 (&c)[kRows][kVec], I32 (&more)[kRows][kVec]) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  if constexpr (kRows > 1) {
#pragma GCC unroll 2
    for (int v = 0; v < kVec; ++v) {
      MultiplyEight<kKind, kRows, kVec, 0>(codes, low, 64 * (half + v), x, stride, v, c);
      MultiplyEight<kKind, kRows, kVec, 2>(codes, low, 64 * (half + v), x, stride, v, c);
    }
    return;
  }
#endif
  DotLanes<kKind, kRows, kVec>(codes, low, half, x, stride, c, more);
}

#undef EDGELM_FLATTEN

#endif  // EDGELM_KERNELS_NEON_DOT_IMPL_H_
