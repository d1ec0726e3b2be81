// y = x W^T for few rows (decode), bound by reading the weights: each weight is read once, 16 bytes per lane and load.
//
// Weights are the M side of the mma (16 rows of a matrix) and tokens the N side, so that 8 tokens cost as much as one.
// A block is `split` warps times some blocks of 16 rows. The warps that share 16 rows divide the columns among them,
// and their sums are added in shared memory in a fixed order. A block of threads loops over its share of the work
// ("items": the next few blocks of 16 rows of an expert) and keeps kAhead loads per lane in flight, also from one item
// to the next.
// Rows of x are in shared memory: all columns if they fit, otherwise `chunk` columns at a time. They are padded by 16
// bytes, so that the eight rows that ldmatrix reads are on different banks.
#pragma once

#include "linear/linear_output.cuh"

namespace edgelm {

// The columns of 16 rows that a warp reads at a time.
template <class W> struct SkinnyUnit {
  static constexpr int columns = Format<W>::columns < 32 ? 32 : Format<W>::columns;
  static constexpr int loads = columns / Format<W>::columns;
};

// The position of a block in its items.
struct SkinnyPlace {
  int active;  // index of the expert among those with rows
  int tile;    // of x_tile of its rows
  int group;   // of its blocks of 16 rows, as many as the block of threads takes at a time
  int chunk;   // of columns
};

// The layout of shared memory. host/operators/linear.cc computes the same size.
template <class W, int NB> struct SkinnyShared {
  u8* x;            // [x_tile] rows of A
  float* sums;      // [2][warps][NB * 4][32]
  u8* scales;       // [2][blocks of 16 rows][groups][16]
  u8* zeros;        // likewise
  float* inverse;   // [NB * 8] of the norm
  float* rounding;  // [NB * 8] scales of x's rows
  float* partial;   // [NB * 8][warps][2]
  int* experts;     // count, then {expert, first slot, rows} of those that have rows
  int pitch;        // bytes from one row of x to the next
  int scale_block;  // bytes of 16 rows' scales
  int zero_block;

  EDGELM_INLINE SkinnyShared(const LinearArgs& args, int warps, int blocks) {
    const int groups = Is<W>::scaled ? args.k / args.group : 0;
    scale_block = groups * kTileRows * Format<W>::scale_bytes;
    zero_block = args.zeros ? groups * kTileRows : 0;
    u8* at = shared_memory();
    x = at;
    pitch = (args.chunk + 31) / 32 * 64 + 16;
    at += args.x_tile * pitch;
    sums = reinterpret_cast<float*>(at);
    at += 2 * warps * NB * 512;
    scales = at;
    at += 2 * blocks * scale_block;
    zeros = at;
    at += 2 * blocks * zero_block;
    inverse = reinterpret_cast<float*>(at);
    at += NB * 32;
    rounding = reinterpret_cast<float*>(at);
    at += NB * 32;
    partial = reinterpret_cast<float*>(at);
    at += NB * 64 * warps;
    experts = reinterpret_cast<int*>(at);
  }
};

// List the experts that have rows, in order; one warp does it.
EDGELM_DEVICE void list_experts(const i32* offsets, int experts, int* list) {
  const int lane = thread() % kWarp;
  int count = 0;
  for (int base = 0; base < experts; base += kWarp) {
    const int expert = base + lane;
    const int first = offsets[min_(expert, experts)], end = offsets[min_(expert + 1, experts)];
    const u32 found = ballot(end > first);
    if (end > first) {
      int* entry = list + 1 + 3 * (count + count_bits(found & ((1u << lane) - 1)));
      entry[0] = expert;
      entry[1] = first;
      entry[2] = end - first;
    }
    count += count_bits(found);
  }
  if (lane == 0) list[0] = count;
}

template <class A, class W, int NB> struct Skinny {
  using Unit = SkinnyUnit<W>;
  // Rows that a lane passes to ldmatrix. Its four matrices are b0 and b1 of two steps of 8 tokens, or of one of 16.
  static constexpr int kRows = NB > 1 ? NB / 2 : 1;

  const LinearArgs& args;
  const int warps, warp, lane, part, own_block, at_a_time;
  const int blocks, groups, tiles, units, chunk_units, chunks;
  SkinnyShared<W, NB> shared;
  int first_item, last_item, actives;
  bool fine;         // a group can end within a unit
  u64 group_factor;  // step * group_factor >> 32 is the step's group

  EDGELM_INLINE explicit Skinny(const LinearArgs& a)
      : args(a),
        warps(block_threads() / kWarp),
        warp(shuffle(thread() / kWarp, 0)),  // from a shuffle the compiler knows that it is the same in all lanes
        lane(thread() % kWarp),
        part(warp % a.split),
        own_block(warp / a.split),
        at_a_time(warps / a.split),
        blocks(blocks_of(a)),
        groups((blocks + at_a_time - 1) / at_a_time),
        tiles(a.k / Format<W>::columns),
        units((a.k + Unit::columns - 1) / Unit::columns),
        chunk_units((a.chunk + Unit::columns - 1) / Unit::columns),
        chunks((units + chunk_units - 1) / chunk_units),
        shared(a, warps, at_a_time) {
    const u32 steps = Is<W>::scaled ? a.group / 16 : 1;
    fine = Is<W>::scaled && a.group % Unit::columns != 0;
    group_factor = ((u64(1) << 32) + steps - 1) / steps;
  }

  EDGELM_INLINE int expert(int active) const { return args.experts ? shared.experts[1 + 3 * active] : 0; }
  EDGELM_INLINE int first_slot(int active) const { return args.experts ? shared.experts[2 + 3 * active] : 0; }
  EDGELM_INLINE int rows(int active) const { return args.experts ? shared.experts[3 + 3 * active] : args.rows; }

  // -- loop over items -
  // ---------------------------------------------------------------------------------------------------------

  EDGELM_INLINE bool begin() {
    actives = args.experts ? shared.experts[0] : (args.rows > 0);
    const i64 items = i64(actives) * groups;
    first_item = int(items * block_x() / grid_x());
    last_item = int(items * (block_x() + 1) / grid_x()) - 1;
    return first_item <= last_item;
  }
  EDGELM_INLINE SkinnyPlace start() const { return {first_item / groups, 0, first_item % groups, 0}; }
  EDGELM_INLINE bool is_end(const SkinnyPlace& p) const { return p.active > last_item / groups; }

  EDGELM_INLINE void next_item(SkinnyPlace& p) const {
    p.chunk = 0;
    const int end = p.active == last_item / groups ? last_item % groups + 1 : groups;
    if (++p.group < end) return;
    p.group = p.active == first_item / groups ? first_item % groups : 0;
    if (++p.tile * args.x_tile < rows(p.active)) return;
    p.tile = 0;
    p.group = 0;
    ++p.active;
  }
  EDGELM_INLINE void next(SkinnyPlace& p) const {
    if (++p.chunk == chunks) next_item(p);
  }

  // -- this warp's weights in an item
  // -------------------------------------------------------------------------------------

  // Units per warp, rounded up; then the first unit of this warp.
  EDGELM_INLINE int share(const SkinnyPlace& p) const {
    return (min_(chunk_units, units - p.chunk * chunk_units) + args.split - 1) / args.split;
  }
  EDGELM_INLINE int first_unit(const SkinnyPlace& p) const { return p.chunk * chunk_units + part * share(p); }
  EDGELM_INLINE int count(const SkinnyPlace& p) const {
    if (is_end(p) || p.group * at_a_time + own_block >= blocks) return 0;
    const int end = min_(units, (p.chunk + 1) * chunk_units);
    return max_(0, min_(share(p), end - first_unit(p)));
  }
  EDGELM_INLINE const u8* source(const SkinnyPlace& p) const {
    if (count(p) == 0) return args.codes;
    const i64 tile = i64(p.group * at_a_time + own_block) * tiles + first_unit(p) * Unit::loads;
    return args.codes + expert(p.active) * args.codes_stride + tile * kTileBytes + lane * 16;
  }

  // Load a unit of the warp. Not `whole`: its last tile is beyond the matrix (16-bit weights, k an odd multiple of 16).
  EDGELM_INLINE void load(const u8* from, bool whole, Words4 (&to)[Unit::loads]) const {
    to[0] = load16_stream(from);
    if constexpr (Unit::loads == 2) {
      if (whole) to[1] = load16_stream(from + kTileBytes);
      else to[1] = {0, 0, 0, 0};
    }
  }

  // Start copying the scales and zero points of an item to shared memory.
  EDGELM_INLINE void copy_scales(const SkinnyPlace& p, int buffer) const {
    if constexpr (Is<W>::scaled) {
      if (!is_end(p)) {
        const int first = p.group * at_a_time;
        const int found = min_(at_a_time, blocks - first);
        copy(shared.scales + buffer * at_a_time * shared.scale_block,
             args.scales + expert(p.active) * args.scales_stride + i64(first) * shared.scale_block,
             found * shared.scale_block);
        if (args.zeros) {
          copy(shared.zeros + buffer * at_a_time * shared.zero_block,
               args.zeros + expert(p.active) * args.zeros_stride + i64(first) * shared.zero_block,
               found * shared.zero_block);
        }
      }
      cp_async_commit();
    }
  }
  EDGELM_INLINE void copy(u8* to, const u8* from, int bytes) const {
    for (int i = thread() * 16; i < bytes; i += block_threads() * 16) cp_async16(to + i, from + i);
  }

  // -- x ------------------------------------------------------------------------------------------------------------------

  EDGELM_INLINE int x_row(const SkinnyPlace& p, int token) const {
    return source_row(args, first_slot(p.active) + p.tile * args.x_tile + token);
  }
  EDGELM_INLINE int tokens(const SkinnyPlace& p) const {
    return min_(args.x_tile, rows(p.active) - p.tile * args.x_tile);
  }
  // Whether x must be converted, normed or rounded before the mma.
  EDGELM_INLINE bool is_raw() const { return args.x_float || args.round_scale != 0.f; }

  // Load eight neighbouring numbers of a row.
  EDGELM_INLINE void x_eight(int row, int column, float (&to)[8]) const {
    const i64 at = i64(row) * args.k + column;
    if (args.x_float) {
      const float* from = static_cast<const float*>(args.x) + at;
      const Words4 low = load16(from), high = load16(from + 4);
      const u32 bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      EDGELM_UNROLL
      for (int i = 0; i < 8; ++i) to[i] = bits_to_float(bits[i]);
    } else {
      const Words4 pairs = load16(static_cast<const A*>(args.x) + at);
      unpack2<A>(pairs.x, to[0], to[1]);
      unpack2<A>(pairs.y, to[2], to[3]);
      unpack2<A>(pairs.z, to[4], to[5]);
      unpack2<A>(pairs.w, to[6], to[7]);
    }
  }
  EDGELM_INLINE void norm_eight(int column, float (&to)[8]) const {
    const Words4 low = load16(args.norm + column), high = load16(args.norm + column + 4);
    const u32 bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    EDGELM_UNROLL
    for (int i = 0; i < 8; ++i) to[i] = bits_to_float(bits[i]);
  }

  // Compute the norm's factor and the rounding scale of each row, by all threads.
  EDGELM_INLINE void measure(const SkinnyPlace& p) const {
    const int count = tokens(p);
    int shares = 1;  // warps per row
    while (shares * 2 * count <= warps) shares *= 2;
    sync_block();
    for (int token = warp / shares; token < count; token += warps / shares) {
      const int row = x_row(p, token);
      float squares = 0.f, largest = 0.f;
      for (int column = 8 * (warp % shares * kWarp + lane); column < args.k; column += 8 * kWarp * shares) {
        float values[8], norm[8];
        x_eight(row, column, values);
        const bool normed = args.norm && args.round_scale < 0.f;  // the maxima are needed only then
        if (normed) norm_eight(column, norm);
        EDGELM_UNROLL
        for (int i = 0; i < 8; ++i) {
          squares = fma_(values[i], values[i], squares);
          largest = max_(largest, abs_(normed ? values[i] * norm[i] : values[i]));
        }
      }
      squares = warp_sum(squares);
      largest = warp_max(largest);
      if (lane == 0) {
        float* to = shared.partial + (token * warps + warp % shares) * 2;
        to[0] = squares;
        to[1] = largest;
      }
    }
    sync_block();
    if (thread() < count) {
      float squares = 0.f, largest = 0.f;
      for (int i = 0; i < shares; ++i) {
        squares += shared.partial[(thread() * warps + i) * 2];
        largest = max_(largest, shared.partial[(thread() * warps + i) * 2 + 1]);
      }
      const float inverse = args.norm ? rsqrt_(squares / float(args.k) + args.epsilon) : 1.f;
      shared.inverse[thread()] = inverse;
      shared.rounding[thread()] = args.round_scale < 0.f ? fp8_scale(largest * inverse) : args.round_scale;
    }
    sync_block();
  }

  // Copy the columns of a chunk to shared memory, zeros behind the last; with cp.async if they need no conversion.
  EDGELM_INLINE void stage(const SkinnyPlace& p) const {
    const int base = p.chunk * chunk_units * Unit::columns;
    const int pieces = (min_(args.k - base, args.chunk) + 31) / 32 * 4;  // of 8 columns
    const int count = tokens(p);
    for (int token = 0; token < count; ++token) {
      const int row = x_row(p, token);
      for (int piece = thread(); piece < pieces; piece += block_threads()) {
        const int column = base + piece * 8;
        u8* to = shared.x + token * shared.pitch + piece * 16;
        if (!is_raw()) {
          cp_async16(to, static_cast<const A*>(args.x) + i64(row) * args.k + column, column < args.k);
        } else {
          stage_eight(row, token, column, to);
        }
      }
    }
    if (!is_raw()) cp_async_commit();
  }

  EDGELM_INLINE void stage_eight(int row, int token, int column, u8* to) const {
    float values[8] = {}, norm[8];
    if (column < args.k) {
      x_eight(row, column, values);
      if (args.norm) {
        norm_eight(column, norm);
        const float inverse = shared.inverse[token];
        EDGELM_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = values[i] * inverse * norm[i];
      }
    }
    if (args.round_scale != 0.f) {
      const float scale = shared.rounding[token], reciprocal = 1.f / scale;
      EDGELM_UNROLL
      for (int i = 0; i < 8; ++i) values[i] = to_float(from_float<e4m3>(divided(values[i], scale, reciprocal)));
    }
    store16(to, {pack2<A>(values[0], values[1]), pack2<A>(values[2], values[3]), pack2<A>(values[4], values[5]),
                 pack2<A>(values[6], values[7])});
  }

  // -- mma
  // ----------------------------------------------------------------------------------------------------------------

  // Scales and zero points of rows g and g + 8 in one group.
  struct Group {
    float low, high;
    u32 zero_low, zero_high;
  };

  EDGELM_INLINE Group group_of(int step, int buffer) const {
    Group found;
    const int index = int(u64(u32(step)) * group_factor >> 32) * kTileRows + lane / 4;
    const int block = buffer * at_a_time + own_block;
    const u8* scales = shared.scales + block * shared.scale_block;
    found.low = scale_at<W>(scales, index);
    found.high = scale_at<W>(scales, index + 8);
    found.zero_low = found.zero_high = zero_pair<A, W>(middle<W>());
    if (Is<W>::integer && args.zeros) {
      const u8* zeros = shared.zeros + block * shared.zero_block;
      found.zero_low = zero_pair<A, W>(zeros[index]);
      found.zero_high = zero_pair<A, W>(zeros[index + 8]);
    }
    return found;
  }

  // Multiply a unit. `at`: its number in the matrix; `x`: this lane's rows for ldmatrix.
  EDGELM_INLINE void consume(const Words4 (&unit)[Unit::loads], int at, const u8* const (&x)[kRows], int offset,
                             int buffer, float (&sums)[NB][4]) const {
    if constexpr (!Is<W>::scaled) {
      multiply<0, Unit::columns / 16>(unit, x, offset, {1.f, 1.f, 0, 0}, sums);
    } else if (fine) {
      multiply_steps<0>(unit, at, x, offset, buffer, sums);
    } else {
      scaled<0, Unit::columns / 16>(unit, x, offset, group_of(at * (Unit::columns / 16), buffer), sums);
    }
  }

  // Multiply step by step where each step has its own group.
  template <int STEP>
  EDGELM_INLINE void multiply_steps(const Words4 (&unit)[Unit::loads], int at, const u8* const (&x)[kRows], int offset,
                                    int buffer, float (&sums)[NB][4]) const {
    constexpr int kSteps = Unit::columns / 16;
    scaled<STEP, STEP + 1>(unit, x, offset, group_of(at * kSteps + STEP, buffer), sums);
    if constexpr (STEP + 1 < kSteps) multiply_steps<STEP + 1>(unit, at, x, offset, buffer, sums);
  }

  template <int FROM, int TO>
  EDGELM_INLINE void scaled(const Words4 (&unit)[Unit::loads], const u8* const (&x)[kRows], int offset, Group group,
                            float (&sums)[NB][4]) const {
    float part_sums[NB][4] = {};
    multiply<FROM, TO>(unit, x, offset, group, part_sums);
    EDGELM_UNROLL
    for (int n = 0; n < NB; ++n) {
      sums[n][0] = fma_(part_sums[n][0], group.low, sums[n][0]);
      sums[n][1] = fma_(part_sums[n][1], group.low, sums[n][1]);
      sums[n][2] = fma_(part_sums[n][2], group.high, sums[n][2]);
      sums[n][3] = fma_(part_sums[n][3], group.high, sums[n][3]);
    }
  }

  // This lane's row n for ldmatrix, at the warp's first column.
  EDGELM_INLINE const u8* x_lane(const SkinnyPlace& p, int n) const {
    const int token = NB > 1 ? n * 16 + lane / 16 * 8 + lane % 8 : lane % 8;
    const int piece = NB > 1 ? lane / 8 % 2 : lane / 8;
    // Rows beyond the last repeat it; their results are not used.
    return shared.x + min_(token, tokens(p) - 1) * shared.pitch + part * share(p) * Unit::columns * 2 + piece * 16;
  }

  // Multiply steps FROM .. TO - 1 of a unit.
  template <int FROM, int TO>
  EDGELM_INLINE void multiply(const Words4 (&unit)[Unit::loads], const u8* const (&x)[kRows], int offset, Group group,
                              float (&sums)[NB][4]) const {
    u32 b[kRows][4];
    EDGELM_UNROLL
    for (int step = FROM; step < TO; ++step) {
      if (NB > 1 || step == FROM || step % 2 == 0) {
        EDGELM_UNROLL
        for (int n = 0; n < kRows; ++n) ldmatrix_x4(b[n], x[n] + offset + (NB > 1 ? step * 32 : step / 2 * 64));
      }
      u32 a[4];
      if constexpr (Unit::loads == 2) fragment<A, W>(unit[step], 0, 0, 0, a);
      else fragment<A, W>(unit[0], step, group.zero_low, group.zero_high, a);
      EDGELM_UNROLL
      for (int n = 0; n < NB; ++n) {
        const int at = NB > 1 ? n % 2 * 2 : step % 2 * 2;
        const u32 operand[2] = {b[n / 2][at], b[n / 2][at + 1]};
        mma_16x8x16<A>(sums[n], a, operand);
      }
    }
  }

  // Add the warps' sums and write the results of an item.
  EDGELM_INLINE void finish(const SkinnyPlace& p, int buffer, const float (&sums)[NB][4]) const {
    float* all = shared.sums + buffer * warps * NB * 128;
    EDGELM_UNROLL
    for (int n = 0; n < NB; ++n) {
      EDGELM_UNROLL
      for (int i = 0; i < 4; ++i) all[(warp * NB * 4 + n * 4 + i) * kWarp + lane] = sums[n][i];
    }
    sync_block();
    const int count = tokens(p);
    for (int i = thread(); i < at_a_time * NB * 64; i += block_threads()) {
      const int from = i % kWarp, column = i / kWarp % 2, n = i / 64 % NB, block = i / (64 * NB);
      const int token = n * 8 + from % 4 * 2 + column;
      if (token >= count || p.group * at_a_time + block >= blocks) continue;
      float low = 0.f, high = 0.f;
      for (int w = 0; w < args.split; ++w) {
        const float* one = all + ((block * args.split + w) * NB * 4 + n * 4 + column) * kWarp + from;
        low += one[0];
        high += one[2 * kWarp];
      }
      float factor = 1.f;
      if (args.round_scale != 0.f) factor = shared.rounding[token];
      if (args.x_scales) factor *= args.x_scales[x_row(p, token)];
      const int slot = first_slot(p.active) + p.tile * args.x_tile + token;
      put_pair<A>(args, slot, p.group * at_a_time + block, from / 4, low * factor, high * factor);
    }
  }
};

template <class A, class W, int NB> EDGELM_BODY void linear_skinny(const LinearArgs& args) {
  using Unit = SkinnyUnit<W>;
  // Units in flight. (For 32 tokens, blocks are half as large and have twice the registers per thread.)
  constexpr int kAhead = (NB == 2 && Same<W, Int4>::value ? 4 : 8) / Unit::loads;
  Skinny<A, W, NB> my(args);
  let_next_kernel_start();
  if (args.experts) {
    wait_for_previous_kernel();
    if (my.warp == 0) list_experts(args.offsets, args.experts, my.shared.experts);
    sync_block();
  }
  const bool any = my.begin();
  SkinnyPlace place = my.start();
  const u8* from = args.codes;
  int count = 0;
  Words4 buffer[kAhead][Unit::loads];
  EDGELM_UNROLL
  for (int i = 0; i < kAhead; ++i) {
    EDGELM_UNROLL
    for (int j = 0; j < Unit::loads; ++j) buffer[i][j] = {0, 0, 0, 0};
  }
  if (any) {  // weights and scales are constant: they may be read before the previous kernel, which writes x, has ended
    from = my.source(place);
    count = my.count(place);
    const int first = my.first_unit(place);
    EDGELM_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (i < count) my.load(from + i * Unit::loads * kTileBytes, (first + i + 1) * Unit::loads <= my.tiles, buffer[i]);
    }
    my.copy_scales(place, 0);
  }
  if (!args.experts) wait_for_previous_kernel();
  if (!any) return;

  float sums[NB][4] = {};
  int item_buffer = 0, staged_active = -1, staged_tile = -1;
  while (!my.is_end(place)) {
    if (place.chunk == 0) {
      SkinnyPlace item = place;
      my.next_item(item);
      my.copy_scales(item, 1 - item_buffer);
    }
    const bool moved = place.active != staged_active || place.tile != staged_tile;
    if (moved && (args.norm || args.round_scale != 0.f)) my.measure(place);
    if (moved || my.chunks > 1) {
      if (place.chunk > 0) sync_block();  // all threads are done with the previous columns
      my.stage(place);
    }
    staged_active = place.active;
    staged_tile = place.tile;
    // Wait for all copies but the next item's scales. If x was just requested those are older, so wait for all.
    if (moved || my.chunks > 1) cp_async_wait<0>();
    else if constexpr (Is<W>::scaled) cp_async_wait<1>();
    sync_block();

    const int first = my.first_unit(place);
    const int rounds = (my.share(place) + kAhead - 1) / kAhead;
    const u8* x[decltype(my)::kRows];
    EDGELM_UNROLL
    for (int n = 0; n < my.kRows; ++n) x[n] = my.x_lane(place, n);
    SkinnyPlace following = place;
    const u8* source = from;  // the next unit to load, how many units follow, and the number of the first
    int left = count, source_unit = first;
    for (int round = 0; round < rounds; ++round) {
      const int done = round * kAhead;
      source += kAhead * Unit::loads * kTileBytes;
      left -= kAhead;
      source_unit += kAhead;
      if (round == rounds - 1) {
        my.next(following);
        source = my.source(following);
        left = my.count(following);
        source_unit = my.first_unit(following);
      }
      EDGELM_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (done + i < count) {
          my.consume(buffer[i], first + done + i, x, (done + i) * Unit::columns * 2, item_buffer, sums);
        }
        if (i < left) {
          my.load(source + i * Unit::loads * kTileBytes, (source_unit + i + 1) * Unit::loads <= my.tiles, buffer[i]);
        }
      }
    }
    if (place.chunk == my.chunks - 1) {
      my.finish(place, item_buffer, sums);
      EDGELM_UNROLL
      for (int n = 0; n < NB; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.f;
      item_buffer = 1 - item_buffer;
    }
    place = following;
    from = source;
    count = left;
  }
}

}  // namespace edgelm
