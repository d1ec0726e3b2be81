// y = x W^T for few rows (decode), bound by reading the weights: each weight is read once, 16 bytes per lane and copy.
//
// Weights are the M side of the mma (16 rows of a matrix) and tokens the N side, so that 8 tokens cost as much as one.
// The warps that share 16 rows divide the columns among them, and their sums are added in shared memory in a fixed
// order. A block of threads loops over its items (skinny_work.cuh), and its warps keep their next tiles in flight.
// Rows of x are in shared memory: all columns if they fit, otherwise a chunk at a time. They are padded by 16 bytes, so
// that the eight rows that ldmatrix reads are on different banks.
#pragma once

#include "linear/skinny_rows.cuh"

namespace edgelm {

template <class A, class W, int NB, int GROUP, bool EXPERTS> struct Skinny {
  using Stream = SkinnyStream<W, GROUP, EXPERTS>;
  // Rows that a lane passes to ldmatrix. Its four matrices are b0 and b1 of two steps of 8 tokens, or of one of 16.
  static constexpr int kRows = NB > 1 ? NB / 2 : 1;
  static constexpr int kGroups = Stream::kSlot.groups, kSteps = Format<W>::steps;  // of a tile

  const SkinnyWork<EXPERTS>& work;
  const SkinnyRows<A, NB, EXPERTS>& rows;
  const Stream& stream;

  // Scales and zero points of rows g and g + 8 in one group.
  struct Group {
    float low = 1.f, high = 1.f;
    u32 zero_low = zero_pair<A, W>(middle<W>()), zero_high = zero_low;
  };

  // This lane's row n for ldmatrix, at the warp's first column.
  EDGELM_INLINE Shared x_lane(const SkinnyPlace& p, int n) const {
    const u32 lane = work.lane;
    const int token = int(NB > 1 ? n * 16 + lane / 16 * 8 + lane % 8 : lane % 8);
    const int piece = int(NB > 1 ? lane / 8 % 2 : lane / 8);
    const int column = work.part * work.share(p) * Format<W>::columns + piece * 8;
    // Rows beyond the last repeat it; their results are not used.
    return shared_address(rows.shared.x) + min_(token, work.tokens(p) - 1) * work.plan.pitch + column * 2;
  }

  // The groups of tile i of a slot. `slot`: this lane's bytes, also below. ZEROS: with zero points.
  template <bool ZEROS> EDGELM_INLINE void groups_of(Shared slot, int i, Group (&found)[kGroups]) const {
    const u32 lane = work.lane;
    const Shared scales = slot - lane * 16 + Stream::kCodes + i * kGroups * kTileRows * Format<W>::scale_bytes;
    if constexpr (GROUP > 0 && Format<W>::scale_bytes == 2) {
      // A row eight times: transposed, lane 4 g + q gets its number g. Rows g, then g + 8, of up to two groups.
      static_assert(kGroups <= 2, "a tile has one or two groups");
      u32 pairs[4];
      ldmatrix_x4_transposed(pairs, scales + (kGroups == 2 ? lane / 8 : lane / 8 % 2) * 16);
      EDGELM_UNROLL
      for (int j = 0; j < kGroups; ++j) {
        found[j].low = f16_to_float(u16(pairs[2 * j]));
        found[j].high = f16_to_float(u16(pairs[2 * j + 1]));
      }
    } else {
      EDGELM_UNROLL
      for (int j = 0; j < kGroups; ++j) {
        found[j].low = scale_of(scales + (j * kTileRows + lane / 4) * Format<W>::scale_bytes);
        found[j].high = scale_of(scales + (j * kTileRows + lane / 4 + 8) * Format<W>::scale_bytes);
      }
    }
    if constexpr (ZEROS) {
      const Shared zeros = slot - lane * 16 + Stream::kSlot.zeros_at + i * kGroups * kTileRows + lane / 4;
      EDGELM_UNROLL
      for (int j = 0; j < kGroups; ++j) {
        found[j].zero_low = zero_pair<A, W>(load1_shared(zeros + j * kTileRows));
        found[j].zero_high = zero_pair<A, W>(load1_shared(zeros + j * kTileRows + 8));
      }
    }
  }

  static EDGELM_INLINE float scale_of(Shared at) {
    if constexpr (Format<W>::scale_bytes == 2) return f16_to_float(u16(load2_shared(at)));
    else return bits_to_float(load4_shared(at));
  }

  // Multiply a slot by the columns at `x`. Its first tile has the number `tile`; `two`: it has a second.
  EDGELM_INLINE void consume(Shared slot, int tile, bool two, const Shared (&x)[kRows], float (&sums)[NB][4]) const {
    if constexpr (Is<W>::scaled) {
      if (Is<W>::integer && work.args.zeros) consume_scaled<Is<W>::integer>(slot, tile, two, x, sums);
      else consume_scaled<false>(slot, tile, two, x, sums);
    } else {
      const Group none[kGroups] = {};
      const auto first = [](int) { return 0; };
      Words4 second = {0, 0, 0, 0};
      if (two) second = load16_shared(slot + kTileBytes);
      multiply<2, 1>({load16_shared(slot), second}, x, 0, none, first, sums);
    }
  }
  template <bool ZEROS>
  EDGELM_INLINE void consume_scaled(Shared slot, int tile, bool two, const Shared (&x)[kRows],
                                    float (&sums)[NB][4]) const {
    consume_tile<ZEROS>(slot, 0, tile, x, sums);
    if (two) consume_tile<ZEROS>(slot, 1, tile + 1, x, sums);
  }
  template <bool ZEROS>
  EDGELM_INLINE void consume_tile(Shared slot, int i, int tile, const Shared (&x)[kRows], float (&sums)[NB][4]) const {
    constexpr int kColumns = Format<W>::columns;
    const int at = i * kColumns * 2;
    Group groups[kGroups];
    const Words4 words = load16_shared(slot + i * kTileBytes);
    groups_of<ZEROS>(slot, i, groups);
    if constexpr (GROUP > 0) {
      constexpr int kTogether = GROUP < kColumns ? 1 : kSteps;
      multiply<1, kTogether>({words}, x, at, groups, [](int step) { return step * 16 / GROUP; }, sums);
    } else if (work.args.group % kColumns == 0) {
      multiply<1, kSteps>({words}, x, at, groups, [](int) { return 0; }, sums);
    } else {
      const int first = tile * kSteps, group = stream.group_of_step(first);
      multiply<1, 1>(
          {words}, x, at, groups, [&](int step) { return stream.group_of_step(first + step) - group; }, sums);
    }
  }

  // Multiply the steps of tiles by the columns `offset` bytes behind `x`. Step s has group group_of(s). TOGETHER
  // steps are summed before they are scaled.
  template <int TILES, int TOGETHER, class GroupOf>
  EDGELM_INLINE void multiply(const Words4 (&words)[TILES], const Shared (&x)[kRows], int offset,
                              const Group (&groups)[kGroups], GroupOf group_of, float (&sums)[NB][4]) const {
    u32 b[kRows][4];
    float part_sums[NB][4];
    EDGELM_UNROLL
    for (int step = 0; step < TILES * kSteps; ++step) {
      if (NB > 1 || step % 2 == 0) {
        EDGELM_UNROLL
        for (int n = 0; n < kRows; ++n) ldmatrix_x4(b[n], x[n] + offset + (NB > 1 ? step * 32 : step / 2 * 64));
      }
      const Group group = chosen(groups, group_of(step));
      u32 a[4];
      fragment<A, W>(words[step / kSteps], step % kSteps, group.zero_low, group.zero_high, a);
      EDGELM_UNROLL
      for (int n = 0; n < NB; ++n) {
        const int at = NB > 1 ? n % 2 * 2 : step % 2 * 2;
        const u32 operand[2] = {b[n / 2][at], b[n / 2][at + 1]};
        if constexpr (!Is<W>::scaled) {
          mma_16x8x16<A>(sums[n], a, operand);
        } else {
          if (step % TOGETHER == 0) part_sums[n][0] = part_sums[n][1] = part_sums[n][2] = part_sums[n][3] = 0.f;
          mma_16x8x16<A>(part_sums[n], a, operand);
          if (step % TOGETHER == TOGETHER - 1) {
            sums[n][0] = fma_(part_sums[n][0], group.low, sums[n][0]);
            sums[n][1] = fma_(part_sums[n][1], group.low, sums[n][1]);
            sums[n][2] = fma_(part_sums[n][2], group.high, sums[n][2]);
            sums[n][3] = fma_(part_sums[n][3], group.high, sums[n][3]);
          }
        }
      }
    }
  }
  // groups[index] without an address, as registers have none.
  static EDGELM_INLINE Group chosen(const Group (&groups)[kGroups], int index) {
    Group group = groups[0];
    EDGELM_UNROLL
    for (int j = 1; j < kGroups; ++j) {
      if (index == j) group = groups[j];
    }
    return group;
  }

  // Add the warps' sums and write the results of an item.
  EDGELM_INLINE void finish(const SkinnyPlace& p, int buffer, const float (&sums)[NB][4]) const {
    const LinearArgs& args = work.args;
    const SkinnyPlan& plan = work.plan;
    float* all = rows.shared.sums + buffer * rows.warps * NB * 128;
    EDGELM_UNROLL
    for (int n = 0; n < NB; ++n) {
      EDGELM_UNROLL
      for (int i = 0; i < 4; ++i) all[(work.warp * NB * 4 + n * 4 + i) * kWarp + work.lane] = sums[n][i];
    }
    sync_block();
    const int count = work.tokens(p), first_block = p.strip * plan.at_a_time, split = 1 << plan.split_shift;
    for (int i = thread(); i < plan.at_a_time * NB * 64; i += block_threads()) {
      const int from = i % kWarp, column = i / kWarp % 2, n = i / 64 % NB, block = i / (64 * NB);
      const int token = n * 8 + from % 4 * 2 + column;
      if (token >= count || first_block + block >= plan.blocks) continue;
      const float* one = all + ((block << plan.split_shift) * NB * 4 + n * 4 + column) * kWarp + from;
      float low = 0.f, high = 0.f;
      EDGELM_UNROLL_BY(4)
      for (int w = 0; w < split; ++w) {
        low += one[w * NB * 128];
        high += one[w * NB * 128 + 2 * kWarp];
      }
      float factor = 1.f;
      if (args.round_scale != 0.f) factor = rows.shared.rounding[token];
      if (args.x_scales) factor *= args.x_scales[rows.x_row(p, token)];
      put_pair<A>(args, work.first_token(p) + token, first_block + block, from / 4, low * factor, high * factor);
    }
  }
};

template <class A, class W, int NB, int GROUP, bool EXPERTS> EDGELM_BODY void linear_skinny(const SkinnyArgs& args) {
  let_next_kernel_start();
  SkinnyWork<EXPERTS> work(args);
  if (work.has_experts()) {
    wait_for_previous_kernel();
    if (work.warp == 0) {
      list_experts(args.linear.offsets, args.linear.experts,
                   reinterpret_cast<int*>(shared_memory() + args.plan.experts_at));
    }
    sync_block();
  }
  const bool any = work.begin();
  if (!any) {
    if (!work.has_experts()) wait_for_previous_kernel();
    return;
  }
  // Weights and scales are constant: they may be read before the previous kernel, which writes x, has ended.
  SkinnyStream<W, GROUP, EXPERTS> stream(work);
  if (!work.has_experts()) wait_for_previous_kernel();

  const SkinnyRows<A, NB, EXPERTS> rows(work);
  const Skinny<A, W, NB, GROUP, EXPERTS> my{work, rows, stream};
  float sums[NB][4] = {};
  int buffer = 0;
  bool moved = true;  // to other rows of x
  for (SkinnyPlace place = work.start(); !work.is_end(place); moved = work.next(place)) {
    if (moved && (args.linear.norm || args.linear.round_scale != 0.f)) rows.measure(place);
    if (moved || args.plan.chunks > 1) {
      if (place.chunk > 0) sync_block();  // all threads are done with the previous columns
      rows.stage(place);
      sync_block();
    }

    int tile, end;
    work.tiles(place, tile, end);
    Shared x[my.kRows];
    EDGELM_UNROLL
    for (int n = 0; n < my.kRows; ++n) x[n] = my.x_lane(place, n);
    for (int left = end - tile; left > 0; left -= 2) {
      my.consume(stream.take(), tile, left > 1, x, sums);
      tile += 2;
      stream.replace();
      EDGELM_UNROLL
      for (int n = 0; n < my.kRows; ++n) x[n] += 2 * Format<W>::columns * 2;
    }
    if (place.chunk == args.plan.chunks - 1) {
      my.finish(place, buffer, sums);
      EDGELM_UNROLL
      for (int n = 0; n < NB; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.f;
      buffer = 1 - buffer;
    }
  }
}

}  // namespace edgelm
