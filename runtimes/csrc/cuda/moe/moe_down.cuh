// The experts' down matmul and their weighted sum in one launch, for few tokens: see moe.cuh.
//
// A block computes 16 columns of the result. It goes through all experts that have tokens, several at a time, and reads
// its 16 rows of each expert's matrix once, whatever the number of tokens, so it has every term of its sums. All blocks
// do the same amount of work whichever experts were chosen. The down results are not written to memory.
#pragma once

#include "moe/moe_args.cuh"
#include "weights.cuh"

namespace edgelm {

constexpr int kDownThreads = 512, kDownWarps = kDownThreads / kWarp;
// Tiles of a warp in shared memory, loaded or in flight. The results of 32 tokens leave room for fewer.
template <int N> struct DownRing { static constexpr int tiles = N < 4 ? 8 : 6; };
constexpr int kDownStride = 20;  // floats per token for 16 results in shared memory, padded against bank conflicts

// The part of one expert's 16 rows that a warp reads.
struct DownPart {
  int expert, first_slot, slots;  // slots = 0: there is no such expert, nothing to read
  int first_tile, tiles;
};

template <class W> EDGELM_DEVICE DownPart down_part(const MoeDownArgs& args, int index) {
  if (index >= args.most_active) return {};
  const Words4 entry = load16(args.active + 4 * (1 + index));
  const int all = args.hidden_columns / Format<W>::columns, piece = thread() / kWarp % args.split;
  const int first = all * piece / args.split, end = entry.z ? all * (piece + 1) / args.split : first;
  return {int(entry.x), int(entry.y), int(entry.z), first, end - first};
}

// Streams the tiles of a warp's experts, one after the other, through a ring in shared memory. All but one of its
// places are in flight, also across experts. Every lane copies and reads its own 16 bytes, so no barrier is needed.
template <class W, int ring_size> struct DownStream {
  const MoeDownArgs& args;
  u8* const ring;  // this lane's bytes of the first tile
  int index;       // of the expert whose tiles are being fetched
  int left = 0;    // of its tiles
  const u8* from = nullptr;
  int fetched = 0, taken = 0;

  EDGELM_INLINE DownStream(const MoeDownArgs& a, u8* shared)
      : args(a), ring(shared + thread() * 16), index(thread() / kWarp / a.split) {
    begin();
    for (int i = 0; i < ring_size - 1; ++i) fetch();
  }
  EDGELM_INLINE void begin() {
    const DownPart part = down_part<W>(args, index);
    const i64 tile = i64(block_x()) * (args.hidden_columns / Format<W>::columns) + part.first_tile;
    from = args.codes + part.expert * args.codes_stride + tile * kTileBytes + thread() % kWarp * 16;
    left = part.tiles;
  }
  EDGELM_INLINE void fetch() {
    if (left > 0) {
      cp_async16(ring + fetched % ring_size * (kDownThreads * 16), from);
      ++fetched;
      from += kTileBytes;
      if (--left == 0) {
        index += kDownWarps / args.split;
        begin();
      }
    }
    cp_async_commit();
  }
  // Return the next tile, and fetch into the place of the previous one.
  EDGELM_INLINE Words4 next() {
    cp_async_wait<ring_size - 2>();
    const Words4 tile = load16(ring + taken % ring_size * (kDownThreads * 16));
    ++taken;
    fetch();
    return tile;
  }
};

template <bool first, class T, class U> struct Pick { using Type = T; };
template <class T, class U> struct Pick<false, T, U> { using Type = U; };

// Scales and zero points of rows g and g + 8 in their stored type: converting them at once would wait for the load.
template <class W> struct DownScales {
  using Stored = typename Pick<Format<W>::scale_bytes == 2, f16, float>::Type;
  Stored low, high;
  int zero_low, zero_high;

  EDGELM_INLINE void load(const MoeDownArgs& args, int expert, int group) {
    if constexpr (Is<W>::scaled) {
      const int groups = args.hidden_columns / args.group, row = thread() % kWarp / 4;
      const i64 at = (i64(block_x()) * groups + min_(group, groups - 1)) * kTileRows + row;
      const Stored* scales = reinterpret_cast<const Stored*>(args.scales + expert * args.scales_stride) + at;
      low = scales[0];
      high = scales[8];
      zero_low = zero_high = middle<W>();
      if (Is<W>::integer && args.zeros) {
        zero_low = args.zeros[expert * args.zeros_stride + at];
        zero_high = args.zeros[expert * args.zeros_stride + at + 8];
      }
    }
  }
};

// total[n] = 16 rows of the expert times 8 of its slots, from slot 8 n on.
template <class A, class W, int N>
EDGELM_DEVICE void down_matmul(const MoeDownArgs& args, const DownPart& part, DownStream<W, DownRing<N>::tiles>& stream,
                               float (&total)[N][4]) {
  const int g = thread() % kWarp / 4, q = thread() % 4;
  const A* const hidden = static_cast<const A*>(args.hidden) + i64(part.first_slot + g) * args.hidden_columns + 2 * q;
  int column = part.first_tile * Format<W>::columns;
  int group = Is<W>::scaled ? column / args.group : 0, left = (group + 1) * args.group - column;
  DownScales<W> scales, next_scales;
  scales.load(args, part.expert, group);
  next_scales.load(args, part.expert, group + 1);
  float sums[N][4] = {};
  u32 zero_low = 0, zero_high = 0;
  const auto enter_group = [&] {
    if constexpr (Is<W>::integer) {
      zero_low = zero_pair<A, W>(scales.zero_low);
      zero_high = zero_pair<A, W>(scales.zero_high);
    }
  };
  const auto leave_group = [&] {
    EDGELM_UNROLL
    for (int n = 0; n < N; ++n) {
      EDGELM_UNROLL
      for (int i = 0; i < 4; ++i) {
        total[n][i] = fma_(sums[n][i], to_float(i < 2 ? scales.low : scales.high), total[n][i]);
        sums[n][i] = 0.f;
      }
    }
  };
  enter_group();
  for (int i = 0; i < part.tiles; ++i) {
    const Words4 tile = stream.next();
    EDGELM_UNROLL
    for (int step = 0; step < Format<W>::steps; ++step) {
      u32 a[4];
      fragment<A, W>(tile, step, zero_low, zero_high, a);
      EDGELM_UNROLL
      for (int n = 0; n < N; ++n) {
        if (n > 0 && 8 * n >= part.slots) break;
        const A* const row = hidden + i64(8 * n) * args.hidden_columns + column;
        const bool real = 8 * n + g < part.slots;
        const u32 b[2] = {real ? load4(row) : 0, real ? load4(row + 8) : 0};
        if constexpr (Is<W>::scaled) mma_16x8x16<A>(sums[n], a, b);
        else mma_16x8x16<A>(total[n], a, b);
      }
      column += 16;
      if constexpr (Is<W>::scaled) {
        left -= 16;
        if (left == 0) {
          leave_group();
          scales = next_scales;
          ++group;
          next_scales.load(args, part.expert, group + 1);
          left = args.group;
          enter_group();
        }
      }
    }
  }
  if constexpr (Is<W>::scaled) leave_group();
}

// Up to 8 N tokens.
template <class A, class W, int N> EDGELM_BODY void moe_down(const MoeDownArgs& args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  constexpr int kRing = DownRing<N>::tiles;
  u8* const ring = shared_memory();                                                   // [kRing][threads] 16 bytes
  float* const results = reinterpret_cast<float*>(ring + kRing * kDownThreads * 16);  // [warps][8 N][kDownStride]
  int* const slots_of = reinterpret_cast<int*>(results + kDownWarps * N * 8 * kDownStride);  // [warps][first, number]
  const int warp = thread() / kWarp, lane = thread() % kWarp, g = lane / 4, q = lane % 4;
  const int at_once = kDownWarps / args.split, active = args.active[0];
  DownStream<W, kRing> stream(args, ring);

  // A thread sums one column of one token. `pair` is the index of the token's next expert.
  const int token = thread() / kTileRows, row = thread() % kTileRows, column = block_x() * kTileRows + row;
  const bool sums = token < args.tokens && column < args.columns;
  float sum = 0.f, weight = 0.f;
  int pair = 0, slot = -1;
  const auto next_pair = [&] {
    slot = pair < args.k ? args.slot_of[token * args.k + pair] : -1;
    weight = slot < 0 ? 0.f : args.slot_weights[slot];
    ++pair;
  };
  if (sums) {
    sum = args.x[i64(token) * args.columns + column];
    next_pair();
  }

  for (int first = 0; first < active; first += at_once) {
    const DownPart part = down_part<W>(args, first + warp / args.split);
    float total[N][4] = {};
    if (part.slots > 0) down_matmul<A, W, N>(args, part, stream, total);
    sync_block();  // the previous results have been read
    EDGELM_UNROLL
    for (int n = 0; n < N; ++n) {
      float* const to = results + (warp * N + n) * 8 * kDownStride;
      EDGELM_UNROLL
      for (int i = 0; i < 4; ++i) to[(2 * q + i % 2) * kDownStride + g + i / 2 * 8] = total[n][i];
    }
    if (lane == 0) {
      slots_of[2 * warp] = part.first_slot;
      slots_of[2 * warp + 1] = part.slots;
    }
    sync_block();
    if (!sums) continue;
    for (int w = 0; w < kDownWarps; w += args.split) {
      const int place = slot - slots_of[2 * w];
      if (slot < 0 || place < 0 || place >= slots_of[2 * w + 1]) continue;
      float output = 0.f;
      for (int piece = 0; piece < args.split; ++piece) {
        output += results[((w + piece) * N * 8 + place) * kDownStride + row];
      }
      sum = fma_(weight, output, sum);
      next_pair();
    }
  }
  if (sums) args.y[i64(token) * args.columns + column] = sum;
}

}  // namespace edgelm
