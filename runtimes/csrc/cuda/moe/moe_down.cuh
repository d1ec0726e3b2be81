// The experts' down matmul and their weighted sum in one launch, for few tokens: see moe.cuh.
//
// A block computes 16 columns of the result. It goes through all experts that have tokens, several at a time, and reads
// its 16 rows of each expert's matrix once, whatever the number of tokens, so it has every term of its sums. All blocks
// do the same amount of work whichever experts were chosen. The down results are not written to memory.
//
// A warp has one expert at a time, or its part of that expert's columns. It keeps a round of tiles in flight, in
// registers, and copies the columns of hidden that they meet, with their scales, to shared memory. No other warp reads
// these, so warps wait for each other only to add up their experts' results.
#pragma once

#include "weights.cuh"
#include "moe/moe_args.cuh"

namespace edgelm {

// `group`: columns per scale where that is a constant of the kernel; 0: there are no scales, or they are read from
// memory, for groups of any size.
template <class W, int N, int group>
constexpr DownSizes kDownSizes = down_sizes(Format<W>::columns, Format<W>::scale_bytes, N, group);

// One expert's slots. 0 slots: there is no such expert.
struct DownPart { int expert, first_slot, slots; };

EDGELM_DEVICE DownPart down_part(const MoeDownArgs& args, int index) {
  if (index >= args.most_active) return {};
  const Words4 entry = load16(args.active + 4 * (1 + index));
  return {int(entry.x), int(entry.y), int(entry.z)};
}

// A round's scales and zero points in shared memory.
struct Staged {
  const u8* scales;
  const u8* zeros;
};

// Scales and zero points of rows g and g + 8 in a group.
template <class A, class W> struct DownScales {
  float low = 1.f, high = 1.f;
  u32 zero_low = 0, zero_high = 0;

  // From 16 scales and, if there are any, 16 zero points.
  EDGELM_INLINE void load(const u8* scales, const u8* zeros, bool has_zeros) {
    const int g = thread() % kWarp / 4;
    low = scale_at<W>(scales, g);
    high = scale_at<W>(scales, g + 8);
    zero_low = zero_high = zero_pair<A, W>(middle<W>());
    if (Is<W>::integer && has_zeros) {
      zero_low = zero_pair<A, W>(zeros[g]);
      zero_high = zero_pair<A, W>(zeros[g + 8]);
    }
  }
};

// A warp's work.
template <class A, class W, int N, int group> struct DownWarp {
  static constexpr DownSizes kSizes = kDownSizes<W, N, group>;
  static constexpr int kColumns = Format<W>::columns, kSteps = Format<W>::steps, kRound = kSizes.round;
  static constexpr bool kStaged = group > 0;  // scales are in shared memory

  const MoeDownArgs& args;
  int warp, lane, own;            // own: the place of its expert among those that the block has at a time
  int first_tile, part_tiles;     // of its part of the columns
  i64 tile_offset, group_offset;  // from an expert's codes to this lane's of the first tile; to the block's groups
  u8* hidden;                     // in shared memory
  u8* scales;
  DownPart part;
  Words4 tiles[kRound];

  // Of the current part.
  const A* rows;          // its rows of hidden
  const u8* part_scales;  // of the block's 16 rows
  const u8* part_zeros;
  DownScales<A, W> now, next;
  float sums[N][4];  // of the group
  int next_group, group_left;

  EDGELM_INLINE explicit DownWarp(const MoeDownArgs& a)
      : args(a),
        warp(shuffle(thread() / kWarp, 0)),  // from a shuffle the compiler knows that it is the same in all lanes
        lane(thread() % kWarp),
        own(warp >> a.split_bits) {
    part = down_part(args, own);
    const int piece = warp & ((1 << a.split_bits) - 1);
    first_tile = args.tiles * piece >> a.split_bits;
    part_tiles = (args.tiles * (piece + 1) >> a.split_bits) - first_tile;
    tile_offset = (i64(block_x()) * args.tiles + first_tile) * kTileBytes + lane * 16;
    group_offset = i64(block_x()) * args.groups * kTileRows;
    hidden = shared_memory() + warp * kDownRows * kSizes.pitch;
    scales = shared_memory() + kSizes.scales + warp * kSizes.warp_scales;
    const u8* from = codes(part);
    const int count = tiles_of(part);
    EDGELM_UNROLL
    for (int i = 0; i < kRound; ++i) {
      if (i < count) tiles[i] = load16_stream(from + i * kTileBytes);
    }
  }

  EDGELM_INLINE const u8* codes(const DownPart& p) const {
    return args.codes + p.expert * args.codes_stride + tile_offset;
  }
  EDGELM_INLINE int tiles_of(const DownPart& p) const { return p.slots > 0 ? part_tiles : 0; }

  // Rounds whose columns are staged at a time.
  EDGELM_INLINE int rounds() const { return part.slots <= kDownRows / 2 ? 2 : 1; }
  EDGELM_INLINE int hidden_of(int round) const { return round * (kDownRows / 2 * kSizes.pitch); }

  // Copy the columns of the next rounds(), from `column` to `end`, and the scales of their groups.
  EDGELM_INLINE void stage(int column, int end) const {
    constexpr int kPieces = kSizes.columns / 8;  // of 16 bytes in a row
    static_assert(kPieces <= kWarp, "a lane has one piece of some rows");
    if constexpr (kStaged) {
      constexpr int kBytes = 2 * kSizes.groups * kSizes.group_bytes;
      const int first = u32(column) / group, found = min_(int(u32(end - column) / group), rounds() * kSizes.groups);
      EDGELM_UNROLL
      for (int i = 0; i < kBytes; i += kWarp * 16) {
        const int at = i + lane * 16;
        if (at < found * kSizes.group_bytes) cp_async16(scales + at, part_scales + first * kSizes.group_bytes + at);
      }
      if (Is<W>::integer && lane < found) {
        if (part_zeros) cp_async16(scales + kBytes + lane * 16, part_zeros + (first + lane) * kTileRows);
        else store16(scales + kBytes + lane * 16, {middles<W>(), middles<W>(), middles<W>(), middles<W>()});
      }
    }
    u8* to = hidden + (lane / kPieces * kSizes.pitch + lane % kPieces * 16);
    const A* from = rows + (lane / kPieces * args.hidden_columns + column + lane % kPieces * 8);
    const int stop = min_(end, column + rounds() * kSizes.columns);
    EDGELM_UNROLL_BY(1)
    for (column += lane % kPieces * 8; column < stop; column += kSizes.columns) {
      EDGELM_UNROLL_BY(1)
      for (int row = lane / kPieces, i = 0; row < min_(part.slots, kDownRows); row += kWarp / kPieces, ++i) {
        cp_async16(to + i * (kWarp / kPieces * kSizes.pitch), from + i64(i * (kWarp / kPieces)) * args.hidden_columns);
      }
      to += hidden_of(1);
      from += kSizes.columns;
    }
    cp_async_commit();
    cp_async_wait<0>();
  }

  EDGELM_INLINE void load_group(DownScales<A, W>& to, int index) const {
    const i64 at = i64(min_(index, args.groups - 1)) * kTileRows;
    to.load(part_scales + at * Format<W>::scale_bytes, part_zeros + at, part_zeros != nullptr);
  }
  EDGELM_INLINE void leave_group(float (&total)[N][4]) {
    EDGELM_UNROLL
    for (int n = 0; n < N; ++n) {
      EDGELM_UNROLL
      for (int i = 0; i < 4; ++i) {
        total[n][i] = fma_(sums[n][i], i < 2 ? now.low : now.high, total[n][i]);
        sums[n][i] = 0.f;
      }
    }
  }

  // Multiply 16 columns of a tile from `column` on. `b`: of the first 8 slots.
  EDGELM_INLINE void multiply(const Words4& tile, int step, int column, const u32 (&b)[2], float (&total)[N][4]) {
    u32 a[4];
    fragment<A, W>(tile, step, now.zero_low, now.zero_high, a);
    EDGELM_UNROLL
    for (int n = 0; n < N; ++n) {
      if (n > 0 && 8 * n >= part.slots) break;
      u32 operand[2] = {b[0], b[1]};
      if (n > 0) {  // an expert seldom has more than 8 of at most 32 tokens
        const int slot = 8 * n + lane / 4;
        const A* const row = rows + i64(slot) * args.hidden_columns + column + lane % 4 * 2;
        operand[0] = slot < part.slots ? load4(row) : 0;
        operand[1] = slot < part.slots ? load4(row + 8) : 0;
      }
      if constexpr (Is<W>::scaled) mma_16x8x16<A>(sums[n], a, operand);
      else mma_16x8x16<A>(total[n], a, operand);
    }
  }

  // Multiply tile i of a round, at `column`. `x`: this lane's row of the round for ldmatrix, `b` what it read last,
  // `staged`: the round's scales.
  EDGELM_INLINE void multiply_tile(int i, int column, const u8* x, u32 (&b)[4], const Staged& staged,
                                   float (&total)[N][4]) {
    const int place = i * kColumns;  // in the round
    EDGELM_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int at = place + step * 16;
      if (at % 32 == 0) ldmatrix_x4(b, x + at * 2);
      if constexpr (kStaged) {
        if (at % group == 0) {
          now.load(staged.scales + at / group * kSizes.group_bytes, staged.zeros + at / group * kTileRows, true);
        }
      }
      const u32 operand[2] = {b[at / 16 % 2 * 2], b[at / 16 % 2 * 2 + 1]};
      multiply(tiles[i], step, column + step * 16, operand, total);
      if constexpr (kStaged) {
        if ((at + 16) % group == 0) leave_group(total);
      } else if constexpr (Is<W>::scaled) {
        group_left -= 16;
        if (group_left == 0) {
          leave_group(total);
          now = next;
          load_group(next, ++next_group);
          group_left = args.group;
        }
      }
    }
  }

  // total[n] = the block's 16 rows of the part's expert times its slots 8 n .. 8 n + 7, over the warp's columns. Tiles
  // of the part that follows are requested as soon as there are no more of this one.
  EDGELM_INLINE void multiply_part(const DownPart& following, float (&total)[N][4]) {
    const u8* from = codes(part);
    const u8* const following_codes = codes(following);
    int left = part_tiles, column = first_tile * kColumns;
    const int end = column + left * kColumns;
    rows = static_cast<const A*>(args.hidden) + i64(part.first_slot) * args.hidden_columns;
    if constexpr (Is<W>::scaled) {
      part_scales = args.scales + part.expert * args.scales_stride + group_offset * Format<W>::scale_bytes;
      part_zeros = args.zeros ? args.zeros + part.expert * args.zeros_stride + group_offset : nullptr;
      EDGELM_UNROLL
      for (int n = 0; n < N; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.f;
    }
    if constexpr (Is<W>::scaled && !kStaged) {
      next_group = divide(column, args.group_divisor);
      group_left = (next_group + 1) * args.group - column;
      load_group(now, next_group);
      load_group(next, ++next_group);
    }
    // Rows beyond the last repeat it; their results are not used.
    const u8* const lane_row = hidden + min_(lane % 8, part.slots - 1) * kSizes.pitch + lane / 8 * 16;
    EDGELM_UNROLL_BY(1)
    while (left > 0) {
      sync_warp();  // all lanes have read the previous columns
      stage(column, end);
      sync_warp();
      EDGELM_UNROLL_BY(1)
      for (int round = 0; round < rounds() && left > 0; ++round) {
        const u8* const x = lane_row + hidden_of(round);
        const Staged staged{scales + round * (kSizes.groups * kSizes.group_bytes),
                            scales + (2 * kSizes.groups * kSizes.group_bytes + round * kSizes.groups * kTileRows)};
        int count = left - kRound;  // tiles to request
        from += kRound * kTileBytes;
        if (count <= 0) {
          from = following_codes;
          count = tiles_of(following);
        }
        u32 b[4];
        EDGELM_UNROLL
        for (int i = 0; i < kRound; ++i) {
          if (i < left) multiply_tile(i, column + i * kColumns, x, b, staged, total);
          if (i < count) tiles[i] = load16_stream(from + i * kTileBytes);
        }
        left -= kRound;
        column += kRound * kColumns;
      }
    }
    if constexpr (Is<W>::scaled && !kStaged) leave_group(total);
  }
};

// Up to 8 N tokens. `group`: 32, 64 or 128, where every warp's part of the columns begins with a group; otherwise 0.
template <class A, class W, int N, int group> EDGELM_BODY void moe_down(const MoeDownArgs& args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  constexpr DownSizes kSizes = kDownSizes<W, N, group>;
  u8* const shared = shared_memory();
  float* const results = reinterpret_cast<float*>(shared + kSizes.results);  // [warps][8 N][stride]
  int* const slots_of = reinterpret_cast<int*>(shared + kSizes.slots);
  Words2* const pairs = reinterpret_cast<Words2*>(shared + kSizes.pairs);
  DownWarp<A, W, N, group> my(args);
  const int warp = my.warp, g = my.lane / 4, q = my.lane % 4;
  const int at_once = kDownWarps >> args.split_bits, active = args.active[0];
  if (thread() < args.pairs) {
    const int slot = args.slot_of[thread()];
    pairs[thread()] = {u32(slot), float_to_bits(args.slot_weights[slot])};
  }

  // A thread sums one column of one token. `pair` is the index of the token's next expert.
  const int token = thread() / kTileRows, row = thread() % kTileRows, column = block_x() * kTileRows + row;
  const bool sums = token < args.tokens && column < args.columns;
  float sum = 0.f;
  if (sums) sum = args.x[i64(token) * args.columns + column];
  int pair = token * args.k;

  EDGELM_UNROLL_BY(1)
  for (int first = 0; first < active; first += at_once) {
    const DownPart following = down_part(args, first + at_once + my.own);
    float total[N][4] = {};
    if (my.part.slots > 0) my.multiply_part(following, total);
    sync_block();  // the previous results have been read
    EDGELM_UNROLL
    for (int n = 0; n < N; ++n) {
      float* const to = results + (warp * N + n) * 8 * kSizes.stride;
      EDGELM_UNROLL
      for (int i = 0; i < 4; ++i) to[(2 * q + i % 2) * kSizes.stride + g + i / 2 * 8] = total[n][i];
    }
    if (my.lane == 0) {
      slots_of[2 * warp] = my.part.first_slot;
      slots_of[2 * warp + 1] = my.part.slots;
    }
    my.part = following;
    sync_block();
    EDGELM_UNROLL_BY(1)
    for (int w = sums ? 0 : kDownWarps; w < kDownWarps && pair < (token + 1) * args.k; w += 1 << args.split_bits) {
      const int place = int(pairs[pair].x) - slots_of[2 * w];
      if (place < 0 || place >= slots_of[2 * w + 1]) continue;
      float output = 0.f;
      for (int piece = 0; piece < 1 << args.split_bits; ++piece) {
        output += results[((w + piece) * N * 8 + place) * kSizes.stride + row];
      }
      sum = fma_(bits_to_float(pairs[pair].y), output, sum);
      ++pair;
    }
    if constexpr (kSizes.overlaid) sync_block();  // the results have been read
  }
  if (sums) args.y[i64(token) * args.columns + column] = sum;
}

}  // namespace edgelm
