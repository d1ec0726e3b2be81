// Attention with tensor cores: tiles of 64 keys come to shared memory in the background, scores are summed in float32
// with the maximum seen so far (online softmax).
//
// Four warps a block. For few rows (decode) they share 16 rows and each has 16 keys of a tile, which it copies and
// awaits by itself; their results are merged at the end. For many rows (prefill) each has 16 rows and all keys.
//
// The keys of a block may be cut into `splits` ranges, of tiles of what the cache holds; the block that is last merges
// what all found, in the order of the splits: results do not depend on which it was.
#pragma once

#include "attention_merge.cuh"
#include "attention_prepare.cuh"

namespace edgelm {

template <class M, class E, int S> struct RowTile {
  static constexpr bool kCodes = kScaled<E>;
  using Tile = Stage<E, S>;

  u32 queries[S / 16][4];
  float sums[S / 8][4];
  float largest[2], total[2];  // of rows g and g + 8; the total of this lane's keys

  // Of rows [0, 16) at `from`, those below `rows`; zeros beyond. Codes come in another order of the columns, that of
  // their words in `scores`.
  EDGELM_INLINE void start(const M* from, int stride, int rows) {
    const int lane = thread() % kWarp, g = lane / 4, q = lane % 4;
    EDGELM_UNROLL
    for (int s = 0; s < S / 16; ++s) {
      EDGELM_UNROLL
      for (int w = 0; w < 4; ++w) {
        const int row = g + w % 2 * 8;
        const int column = kCodes ? 16 * s + 4 * q + w / 2 * 2 : 16 * s + 2 * q + w / 2 * 8;
        queries[s][w] = row < rows ? load4(from + i64(row) * stride + column) : 0;
      }
    }
    EDGELM_UNROLL
    for (int d = 0; d < S / 8; ++d) {
      EDGELM_UNROLL
      for (int i = 0; i < 4; ++i) sums[d][i] = 0.f;
    }
    EDGELM_UNROLL
    for (int i = 0; i < 2; ++i) {
      largest[i] = -bits_to_float(0x7f800000u);
      total[i] = 0.f;
    }
  }

  // Queries times the 16 keys from `key` on: s[0], s[1] are of keys 0..7 and 8..15.
  EDGELM_INLINE void scores(const u8* stage, int key, float (&s)[2][4]) const {
    const int lane = thread() % kWarp;
    const int row = key + lane / 16 * 8 + lane % 8;
    EDGELM_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
      u32 words[4];  // keys 0..7 of chunk and the next, keys 8..15 of them
      ldmatrix_x4(words, stage + Tile::at(row, chunk + lane / 8 % 2));
      EDGELM_UNROLL
      for (int half = 0; half < 2; ++half) {
        if constexpr (kCodes) {
          EDGELM_UNROLL
          for (int step = 0; step < 2; ++step) {
            const u32 word = words[2 * half + step];
            const u32 b[2] = {widen<M, E>(word, 0, 1), widen<M, E>(word, 2, 3)};
            mma_16x8x16<M>(s[half], queries[chunk + step], b);
          }
        } else {
          const u32 b[2] = {words[2 * half], words[2 * half + 1]};
          mma_16x8x16<M>(s[half], queries[chunk / 2], b);
        }
      }
    }
  }

  // Adds the values of 16 keys, weighted. Of codes, even columns of 16 are sums[2 i], odd ones sums[2 i + 1].
  EDGELM_INLINE void add_values(const u8* stage, int key, const u32 (&weights)[4]) {
    const int lane = thread() % kWarp;
    const int row = key + lane / 8 % 2 * 8 + lane % 8;
    EDGELM_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
      u32 words[4];  // keys 0..7 and 8..15 of chunk, then of the next
      ldmatrix_x4_transposed(words, stage + Tile::kValues + Tile::at(row, chunk + lane / 16));
      EDGELM_UNROLL
      for (int step = 0; step < 2; ++step) {
        const u32 low = words[2 * step], high = words[2 * step + 1];
        if constexpr (kCodes) {
          EDGELM_UNROLL
          for (int odd = 0; odd < 2; ++odd) {
            const u32 b[2] = {widen<M, E>(low, odd, odd + 2), widen<M, E>(high, odd, odd + 2)};
            mma_16x8x16<M>(sums[2 * (chunk + step) + odd], weights, b);
          }
        } else {
          const u32 b[2] = {low, high};
          mma_16x8x16<M>(sums[chunk + step], weights, b);
        }
      }
    }
  }

  // Attends to `keys` keys of a tile from `first` on, which is at `position` of the sequence; row i of this lane sees
  // those before limit[i]. `edge`: some row may not see all of them.
  template <int keys>
  EDGELM_INLINE void attend(const u8* stage, int first, int position, bool edge, const int (&limit)[2], float factor) {
    const int q = thread() % 4;
    float s[keys / 8][4];
    EDGELM_UNROLL
    for (int k = 0; k < keys / 8; ++k) {
      EDGELM_UNROLL
      for (int i = 0; i < 4; ++i) s[k][i] = 0.f;
    }
    EDGELM_UNROLL
    for (int k = 0; k < keys / 16; ++k) {
      float(&pair)[2][4] = *reinterpret_cast<float(*)[2][4]>(&s[2 * k]);
      scores(stage, first + 16 * k, pair);
    }
    float highest[2] = {largest[0], largest[1]};
    EDGELM_UNROLL
    for (int k = 0; k < keys / 8; ++k) {
      EDGELM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int key = 8 * k + 2 * q + i % 2;
        if constexpr (kCodes) s[k][i] *= scale_of(stage + Tile::kKeyScales, first + key);
        s[k][i] *= factor;
        if (edge && position + key >= limit[i / 2]) s[k][i] = -bits_to_float(0x7f800000u);
        highest[i / 2] = max_(highest[i / 2], s[k][i]);
      }
    }
    float base[2];
    EDGELM_UNROLL
    for (int i = 0; i < 2; ++i) {
      highest[i] = max_(highest[i], shuffle_xor(highest[i], 1));
      highest[i] = max_(highest[i], shuffle_xor(highest[i], 2));
      base[i] = highest[i] > -bits_to_float(0x7f800000u) ? highest[i] : 0.f;
      const float shrink = exp2_fast(largest[i] - base[i]);
      largest[i] = highest[i];
      total[i] *= shrink;
      EDGELM_UNROLL
      for (int d = 0; d < S / 8; ++d) {
        sums[d][2 * i] *= shrink;
        sums[d][2 * i + 1] *= shrink;
      }
    }
    EDGELM_UNROLL
    for (int k = 0; k < keys / 16; ++k) {
      u32 weights[4];
      EDGELM_UNROLL
      for (int half = 0; half < 2; ++half) {
        float of_keys[4];
        EDGELM_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int key = 16 * k + 8 * half + 2 * q + i % 2;
          of_keys[i] = exp2_fast(s[2 * k + half][i] - base[i / 2]);
          total[i / 2] += of_keys[i];
          if constexpr (kCodes) {
            // Beyond the last key a scale is anything, NaN included.
            const bool seen = !edge || position + key < limit[i / 2];
            of_keys[i] *= seen ? scale_of(stage + Tile::kValueScales, first + key) * kWeightFactor : 0.f;
          }
        }
        weights[2 * half] = pack2<M>(of_keys[0], of_keys[1]);
        weights[2 * half + 1] = pack2<M>(of_keys[2], of_keys[3]);
      }
      add_values(stage, first + 16 * k, weights);
    }
  }

  // float16 has too few exponents for small scales times small weights: 64 times them still fits (516 is the largest
  // scale of float16 values).
  static constexpr float kWeightFactor = kCodes && Same<M, f16>::value ? 64.f : 1.f;

  EDGELM_INLINE void finish() {
    EDGELM_UNROLL
    for (int i = 0; i < 2; ++i) {
      total[i] += shuffle_xor(total[i], 1);
      total[i] += shuffle_xor(total[i], 2);
    }
    if constexpr (kWeightFactor != 1.f) {
      EDGELM_UNROLL
      for (int d = 0; d < S / 8; ++d) {
        EDGELM_UNROLL
        for (int i = 0; i < 4; ++i) sums[d][i] *= 1.f / kWeightFactor;
      }
    }
  }

  // This lane's results of row g + 8 i are pairs of columns: pair n begins at column(n).
  static constexpr int kPairs = S / 8;
  static EDGELM_INLINE int column(int n) {
    const int q = thread() % 4;
    return kCodes ? n / 2 * 16 + 4 * q + n % 2 * 2 : 8 * n + 2 * q;
  }
  EDGELM_INLINE void pair(int n, int i, float& low, float& high) const {
    low = kCodes ? sums[n / 2 * 2][2 * i + n % 2] : sums[n][2 * i];
    high = kCodes ? sums[n / 2 * 2 + 1][2 * i + n % 2] : sums[n][2 * i + 1];
  }

 private:
  static EDGELM_INLINE float scale_of(const u8* scales, int key) { return reinterpret_cast<const float*>(scales)[key]; }
};

// Bytes of shared memory of a block; also in attention.py.
template <class E, int S, bool few> constexpr int kTilesShared = (few ? 3 : 2) * Stage<E, S>::kBytes;

// A grid of (row blocks * splits, G, B) blocks of 4 warps. `prepares`: queries, keys and values are prepared here, by
// each block those that it needs; only with one row block.
template <class A, class E, int S, bool few, bool prepares>
EDGELM_BODY void attention_tiles(const AttentionArgs& args) {
  static_assert(few || !prepares, "several blocks of rows would append the same keys");
  using M = Product<A, E>;
  using Tile = Stage<E, S>;
  constexpr int kStages = few ? 3 : 2;
  constexpr int kBlockRows = few ? 16 : 64;
  constexpr int kWarpKeys = few ? 16 : kTileKeys;
  wait_for_previous_kernel();
  let_next_kernel_start();

  const int warp = thread() / kWarp, lane = thread() % kWarp;
  const BlockOfRows block = block_of_rows<kBlockRows>(args);
  if (block.tiles == 0) {  // nothing but padding
    if (block.split == 0) clear_rows<A, S, kBlockRows>(args, block);
    return;
  }
  if (block.split >= block.active) return;

  u8* shared = shared_memory();
  const u8* keys = args.key_cache + cache_offset<E, S>(args, block.b, block.g);
  const u8* values = args.value_cache + cache_offset<E, S>(args, block.b, block.g);
  const int first_tile = block.split * block.tiles / block.active;
  const int end_tile = (block.split + 1) * block.tiles / block.active;
  const auto load = [&](int tile, int skip) {
    u8* stage = shared + (tile - first_tile) % kStages * Tile::kBytes;
    if constexpr (few) {
      load_keys<E, S, 16, kWarp>(stage, keys, values, args.capacity, tile, 16 * warp, lane, block.end, skip);
    } else {
      load_keys<E, S, kTileKeys, kAttentionThreads>(stage, keys, values, args.capacity, tile, 0, thread(), block.end,
                                                    skip);
    }
  };
  for (int i = 0; i < kStages - 1; ++i) {
    if (first_tile + i < end_tile) load(first_tile + i, prepares ? block.past : block.end);
    cp_async_commit();
  }

  RowTile<M, E, S> rows;
  const int warp_row = block.first + (few ? 0 : 16 * warp);
  if constexpr (prepares) {
    // The last stage is not in use yet: queries in the lower part, as rows of S numbers and 16 bytes.
    u8* scratch = shared + (kStages - 1) * Tile::kBytes;
    prepare_rows<A, E, S>(args, block, first_tile, end_tile, kStages - 1, scratch);
    sync_block();
    rows.start(reinterpret_cast<const M*>(scratch + 64), S + 8, 16);
    sync_block();
  } else {
    const M* queries = static_cast<const M*>(args.queries) + (i64(block.b) * args.kv_heads + block.g) * block.rows * S;
    rows.start(queries + i64(warp_row) * S, S, block.rows - warp_row);
  }

  int limit[2];
  EDGELM_UNROLL
  for (int i = 0; i < 2; ++i) limit[i] = block.limit(warp_row + lane / 4 + 8 * i);
  const int lowest = block.limit(warp_row);  // 0: the warp's rows are padding
  const int highest = block.limit(min_(warp_row + 16, block.fresh_rows) - 1);
  const float factor = args.scale * kLog2E;
  for (int tile = first_tile; tile < end_tile; ++tile) {
    cp_async_wait<kStages - 2>();
    if constexpr (few) sync_warp();
    else sync_block();
    if (tile + kStages - 1 < end_tile) load(tile + kStages - 1, block.end);
    cp_async_commit();
    const int first = few ? 16 * warp : 0;
    const int position = tile * kTileKeys + first;
    if (lowest == 0 || position >= highest) continue;
    const u8* stage = shared + (tile - first_tile) % kStages * Tile::kBytes;
    rows.template attend<kWarpKeys>(stage, first, position, position + kWarpKeys > lowest, limit, factor);
  }
  cp_async_wait<0>();
  rows.finish();

  if constexpr (few) {
    sync_block();  // the stages are free
    MergedRows<S> merged(shared);
    merged.put(rows, warp, lane);
    sync_block();
    if (block.active == 1) {
      merged.template write<A>(args, block);
      return;
    }
    merged.write_partial(args, block);
    if (!block.is_last(args, merged.flag())) return;
    merged.gather(args, block, warp, lane);
    sync_block();
    merged.template write<A>(args, block);
  } else {
    write_tile<A, S, kBlockRows>(args, block, rows, warp_row, lane);
    if (block.active == 1) return;
    sync_block();
    if (!block.is_last(args, reinterpret_cast<int*>(shared))) return;
    merge_splits<A, S, kBlockRows>(args, block);
  }
}

}  // namespace edgelm
