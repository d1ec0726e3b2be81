// Attention of one warp's query rows to keys of a tile in shared memory, on tensor cores. Scores are float32; weights
// are relative to the largest score so far (online softmax).
#pragma once

#include "attention/attention_rows.cuh"

namespace edgelm {

// `count` times 16 rows of a warp: their queries, and their softmax state so far. Keys and values are numbers of M, or
// codes of E, which are converted here.
template <class M, class E, int S, int count> struct RowTiles {
  static constexpr bool kCodes = sizeof(E) == 1;
  static constexpr bool kQueriesStay = count == 1;  // in registers; of more rows they are read from shared memory
  static constexpr int kRows = 16 * count;
  using Tile = Stage<E, S>;

  u32 queries[kQueriesStay ? S / 16 : 1][4];
  int shared_queries;  // where the warp's first row is in shared memory
  float sums[count][S / 8][4];
  float largest[2 * count], total[2 * count];  // of rows g, g + 8, g + 16, ...; the total of this lane's keys

  EDGELM_INLINE void clear() {
    EDGELM_UNROLL
    for (int n = 0; n < count; ++n) {
      EDGELM_UNROLL
      for (int d = 0; d < S / 8; ++d) {
        EDGELM_UNROLL
        for (int i = 0; i < 4; ++i) sums[n][d][i] = 0.f;
      }
    }
    EDGELM_UNROLL
    for (int i = 0; i < 2 * count; ++i) {
      largest[i] = -bits_to_float(0x7f800000u);
      total[i] = 0.f;
    }
  }

  // Load the rows at `from` whose number is below `rows`; the others are zeros.
  EDGELM_INLINE void load_queries(const M* from, int stride, int rows) {
    const int g = thread() % kWarp / 4, q = thread() % 4;
    EDGELM_UNROLL
    for (int s = 0; s < S / 16; ++s) {
      EDGELM_UNROLL
      for (int w = 0; w < 4; ++w) {
        const int row = g + w % 2 * 8;
        queries[s][w] = row < rows ? load4(from + i64(row) * stride + 16 * s + 2 * q + w / 2 * 8) : 0;
      }
    }
  }

  EDGELM_INLINE void queries_of_step(int step, u32 (&a)[count][4]) const {
    EDGELM_UNROLL
    for (int n = 0; n < count; ++n) {
      if constexpr (kQueriesStay) {
        EDGELM_UNROLL
        for (int w = 0; w < 4; ++w) a[n][w] = queries[step][w];
      } else {
        const int lane = thread() % kWarp;
        const int from = shared_queries + Stage<M, S>::at(16 * n + lane % 16, lane / 16);
        ldmatrix_x4(a[n], shared_memory() + Stage<M, S>::behind(from, 2 * step));
      }
    }
  }

  // s = queries times the keys of the tile from `first` on.
  template <int keys>
  EDGELM_INLINE void scores(int stage, int first, float (&s)[count][keys / 8][4]) const {
    const int lane = thread() % kWarp;
    EDGELM_UNROLL
    for (int n = 0; n < count; ++n) {
      EDGELM_UNROLL
      for (int k = 0; k < keys / 8; ++k) {
        EDGELM_UNROLL
        for (int i = 0; i < 4; ++i) s[n][k][i] = 0.f;
      }
    }
    // ldmatrix loads four matrices of 8 keys by 16 bytes at a time. For 2-byte numbers these are two chunks of 16 keys,
    // one mma step. For codes: one chunk of 32 keys, one step; or two chunks where there are only 16 keys.
    constexpr bool kWide = kCodes && keys >= 32;
    constexpr int kSteps = kCodes && !kWide ? 2 : 1;
    EDGELM_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; chunk += kWide ? 1 : 2) {
      u32 a[kSteps][count][4];
      EDGELM_UNROLL
      for (int step = 0; step < kSteps; ++step) queries_of_step(kCodes ? chunk + step : chunk / 2, a[step]);
      EDGELM_UNROLL
      for (int k = 0; k < keys / 8; k += kWide ? 4 : 2) {
        u32 words[4];  // the keys of one chunk; or keys 0..7, then 8..15, of two chunks
        const int row = first + 8 * k + (kWide ? lane : lane / 16 * 8 + lane % 8);
        const int from = stage + Tile::at(row, kWide ? 0 : lane / 8 % 2);
        ldmatrix_x4(words, shared_memory() + Tile::behind(from, chunk));
        EDGELM_UNROLL
        for (int part = 0; part < (kWide ? 4 : 2); ++part) {
          EDGELM_UNROLL
          for (int step = 0; step < kSteps; ++step) {
            u32 b[2];
            if constexpr (kCodes) {
              const u32 word = words[kWide ? part : 2 * part + step];
              b[0] = upcast<M, E>(word, 0, 1);
              b[1] = upcast<M, E>(word, 2, 3);
            } else {
              b[0] = words[2 * part];
              b[1] = words[2 * part + 1];
            }
            EDGELM_UNROLL
            for (int n = 0; n < count; ++n) mma_16x8x16<M>(s[n][k + part], a[step][n], b);
          }
        }
      }
    }
  }

  // sums += weights times the values of 16 keys. For codes, even columns of 16 are sums[2 i], odd ones sums[2 i + 1].
  EDGELM_INLINE void add_values(int stage, int key, const u32 (&weights)[count][4]) {
    const int lane = thread() % kWarp;
    const int from = stage + Tile::kValues + Tile::at(key + lane / 8 % 2 * 8 + lane % 8, lane / 16);
    EDGELM_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
      u32 words[4];  // keys 0..7 and 8..15 of this chunk, then of the next
      ldmatrix_x4_transposed(words, shared_memory() + Tile::behind(from, chunk));
      EDGELM_UNROLL
      for (int step = 0; step < 2; ++step) {
        const u32 low = words[2 * step], high = words[2 * step + 1];
        EDGELM_UNROLL
        for (int odd = 0; odd < (kCodes ? 2 : 1); ++odd) {
          u32 b[2] = {low, high};
          if constexpr (kCodes) {
            b[0] = upcast<M, E>(low, odd, odd + 2);
            b[1] = upcast<M, E>(high, odd, odd + 2);
          }
          const int d = kCodes ? 2 * (chunk + step) + odd : chunk + step;
          EDGELM_UNROLL
          for (int n = 0; n < count; ++n) mma_16x8x16<M>(sums[n][d], weights[n], b);
        }
      }
    }
  }

  // Attend to `keys` keys of a tile from `first` on; that key is at `position`. The tile is at `stage` in shared
  // memory. `scales`: of the tile's keys, then of its values. `edge`: some row may not see all of the keys (padding
  // rows see them all). `row`: this lane's first row in the block. `factor`: of the scores, for base 2.
  template <int keys, bool scaled>
  EDGELM_INLINE void attend(int stage, const float* scales, int first, int position, bool edge, int row,
                            const BlockOfRows& block, float factor) {
    const int q = thread() % 4;
    float s[count][keys / 8][4];
    scores<keys>(stage, first, s);
    EDGELM_UNROLL
    for (int k = 0; k < keys / 8; ++k) {
      EDGELM_UNROLL
      for (int column = 0; column < 2; ++column) {
        float by = factor;
        if constexpr (scaled) by *= scales[first + 8 * k + 2 * q + column];
        EDGELM_UNROLL
        for (int i = 0; i < 2 * count; ++i) s[i / 2][k][i % 2 * 2 + column] *= by;
      }
    }
    if (edge) hide<keys>(s, position + 2 * q, block.first + row, block);
    EDGELM_UNROLL
    for (int i = 0; i < 2 * count; ++i) weights_of_row<keys>(i, s);
    EDGELM_UNROLL
    for (int k = 0; k < keys / 8; k += 2) {
      if constexpr (scaled) {
        EDGELM_UNROLL
        for (int half = 0; half < 2; ++half) {
          EDGELM_UNROLL
          for (int column = 0; column < 2; ++column) {
            const int key = 8 * (k + half) + 2 * q + column;
            // Beyond the last key a scale may be anything, also NaN. The weight there is 0 and 0 * scale must be 0.
            const float scale = min_(abs_(scales[kTileKeys + first + key]), 1e36f) * kWeightFactor;
            EDGELM_UNROLL
            for (int i = 0; i < 2 * count; ++i) s[i / 2][k + half][i % 2 * 2 + column] *= scale;
          }
        }
      }
      u32 weights[count][4];
      EDGELM_UNROLL
      for (int n = 0; n < count; ++n) {
        EDGELM_UNROLL
        for (int w = 0; w < 4; ++w) {
          weights[n][w] = pack2<M>(s[n][k + w / 2][w % 2 * 2], s[n][k + w / 2][w % 2 * 2 + 1]);
        }
      }
      add_values(stage, first + 8 * k, weights);
    }
  }

  // Causal mask. Row r is token r / shared_by, which sees keys up to its own. This lane's first key is at `position`.
  template <int keys>
  static EDGELM_INLINE void hide(float (&s)[count][keys / 8][4], int position, int row, const BlockOfRows& block) {
    const int shared_by = block.shared_by, ahead = position - block.past;
    EDGELM_UNROLL
    for (int k = 0; k < keys / 8; ++k) {
      EDGELM_UNROLL
      for (int column = 0; column < 2; ++column) {
        const int first_row = (ahead + 8 * k + column) * shared_by - row;
        EDGELM_UNROLL
        for (int i = 0; i < 2 * count; ++i) {
          if (first_row > 8 * i) s[i / 2][k][i % 2 * 2 + column] = -bits_to_float(0x7f800000u);
        }
      }
    }
  }

  // Online softmax: turn the scores of row i into weights and rescale the earlier sums to the new maximum.
  template <int keys> EDGELM_INLINE void weights_of_row(int i, float (&s)[count][keys / 8][4]) {
    float highest = largest[i];
    EDGELM_UNROLL
    for (int k = 0; k < keys / 8; ++k) {
      highest = max_(highest, max_(s[i / 2][k][i % 2 * 2], s[i / 2][k][i % 2 * 2 + 1]));
    }
    highest = max_(highest, shuffle_xor(highest, 1));
    highest = max_(highest, shuffle_xor(highest, 2));
    const float base = highest > -bits_to_float(0x7f800000u) ? highest : 0.f;
    const float shrink = exp2_fast(largest[i] - base);
    largest[i] = highest;
    total[i] *= shrink;
    EDGELM_UNROLL
    for (int k = 0; k < keys / 8; ++k) {
      EDGELM_UNROLL
      for (int column = 0; column < 2; ++column) {
        float& score = s[i / 2][k][i % 2 * 2 + column];
        score = exp2_fast(score - base);
        total[i] += score;
      }
    }
    EDGELM_UNROLL
    for (int d = 0; d < S / 8; ++d) {
      sums[i / 2][d][i % 2 * 2] *= shrink;
      sums[i / 2][d][i % 2 * 2 + 1] *= shrink;
    }
  }

  // float16 has too little range for small scales times small weights, so they are multiplied by 64, which still fits
  // (516 is the largest scale of float16 values).
  static constexpr float kWeightFactor = Same<M, f16>::value ? 64.f : 1.f;

  template <bool scaled> EDGELM_INLINE void finish() {
    EDGELM_UNROLL
    for (int i = 0; i < 2 * count; ++i) {
      total[i] += shuffle_xor(total[i], 1);
      total[i] += shuffle_xor(total[i], 2);
      if constexpr (scaled && kWeightFactor != 1.f) {
        EDGELM_UNROLL
        for (int d = 0; d < S / 8; ++d) {
          sums[i / 2][d][i % 2 * 2] *= 1.f / kWeightFactor;
          sums[i / 2][d][i % 2 * 2 + 1] *= 1.f / kWeightFactor;
        }
      }
    }
  }

  // This lane holds the results of row g + 8 i as pairs of columns; pair n begins at column(n).
  static constexpr int kPairs = S / 8;
  static EDGELM_INLINE int column(int n) {
    const int q = thread() % 4;
    return kCodes ? n / 2 * 16 + 4 * q + n % 2 * 2 : 8 * n + 2 * q;
  }
  EDGELM_INLINE void pair(int n, int i, float& low, float& high) const {
    const int at = i % 2 * 2;
    low = kCodes ? sums[i / 2][n / 2 * 2][at + n % 2] : sums[i / 2][n][at];
    high = kCodes ? sums[i / 2][n / 2 * 2 + 1][at + n % 2] : sums[i / 2][n][at + 1];
  }
};

}  // namespace edgelm
