// Products with few rows, where reading the weights is all the time there is: they are read once, 16 bytes a lane.
//
// Weights are the M side of the tensor cores' product (16 rows of a matrix), tokens the N side, so that 8 of them cost
// what one does. A block is `split` warps times some blocks of 16 rows: the warps that share 16 rows take a part of the
// columns each, and their sums are added in shared memory in a fixed order. A block of threads walks over its share of
// the work ("items": an expert's next few 16 rows) and always has kAhead loads a lane under way, across items too.
// x lies in shared memory in the order of operands, all of it where it fits, else `chunk` columns at a time.
#pragma once

#include "linear_args.cuh"

namespace edgelm {

// 32 columns of x for NB times 8 tokens: [NB][lane][2 steps][b0, b1], and what keeps writers off each other's banks.
template <int NB> struct SkinnyX { static constexpr int bytes = NB * 512 + 64; };

template <class W> struct SkinnyUnit {
  static constexpr int columns = Format<W>::columns < 32 ? 32 : Format<W>::columns;
  static constexpr int loads = columns / Format<W>::columns;
  static constexpr int ahead = 8 / loads;  // units under way
};

// Where a block is in its work.
struct SkinnyPlace {
  int active;  // index of the expert among those with rows
  int tile;    // of NB times 8 of its rows
  int group;   // of its blocks of 16 rows, as many as the block of threads takes at a time
  int chunk;   // of columns
};

// The parts of shared memory; linear.py computes the same sum.
template <class W, int NB> struct SkinnyShared {
  u8* x;
  float* sums;      // [2][warps][NB * 4][32]
  u8* scales;       // [2][blocks of 16 rows][groups][16]
  u8* zeros;        // likewise
  float* inverse;   // [NB * 8] of the norm
  float* rounding;  // [NB * 8] scales of x's rows
  float* partial;   // [NB * 8][warps][2]
  int* experts;     // count, then {expert, first slot, rows} of those that have rows
  int scale_block;  // bytes of 16 rows' scales
  int zero_block;

  EDGELM_INLINE SkinnyShared(const LinearArgs& args, int warps, int blocks) {
    const int groups = Is<W>::scaled ? args.k / args.group : 0;
    scale_block = groups * kTileRows * Format<W>::scale_bytes;
    zero_block = args.zeros ? groups * kTileRows : 0;
    u8* at = shared_memory();
    x = at;
    at += ((args.chunk + 31) / 32) * SkinnyX<NB>::bytes;
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

// The experts that have rows, in order: one warp makes the list.
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

  const LinearArgs& args;
  const int warps, warp, lane, part, own_block, at_a_time;
  const int blocks, groups, tiles, units, chunk_units, chunks;
  SkinnyShared<W, NB> shared;
  int first_item, last_item, actives;
  bool fine;         // groups end within a unit
  u64 group_factor;  // step * group_factor >> 32 is the step's group

  EDGELM_INLINE explicit Skinny(const LinearArgs& a)
      : args(a),
        warps(block_threads() / kWarp),
        warp(thread() / kWarp),
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

  // -- the walk ---------------------------------------------------------------------------------------------------------

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
    if (++p.tile * NB * 8 < rows(p.active)) return;
    p.tile = 0;
    p.group = 0;
    ++p.active;
  }
  EDGELM_INLINE void next(SkinnyPlace& p) const {
    if (++p.chunk == chunks) next_item(p);
  }

  // -- this warp's weights in a place -------------------------------------------------------------------------------------

  // Units that each warp has there, rounded up, and the first of this warp.
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

  // Unit `at` of the warp's, and whether its last tile is beyond the matrix (16-bit weights, k an odd multiple of 16).
  EDGELM_INLINE void load(const u8* from, bool whole, Words4 (&to)[Unit::loads]) const {
    to[0] = load16_stream(from);
    if constexpr (Unit::loads == 2) {
      if (whole) to[1] = load16_stream(from + kTileBytes);
      else to[1] = {0, 0, 0, 0};
    }
  }

  // Begins to copy the scales and zero points of an item to shared memory.
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
    return source_row(args, first_slot(p.active) + p.tile * NB * 8 + token);
  }
  EDGELM_INLINE int tokens(const SkinnyPlace& p) const { return min_(NB * 8, rows(p.active) - p.tile * NB * 8); }

  // Two neighbouring numbers of a row.
  EDGELM_INLINE void x_pair(int row, int column, float& low, float& high) const {
    const i64 at = i64(row) * args.k + column;
    if (args.x_float) {
      const Words2 pair = load8(static_cast<const float*>(args.x) + at);
      low = bits_to_float(pair.x);
      high = bits_to_float(pair.y);
    } else {
      unpack2<A>(load4(static_cast<const A*>(args.x) + at), low, high);
    }
  }

  // The norm's factor and the scale of rounding of each row, by all threads.
  EDGELM_INLINE void measure(const SkinnyPlace& p) const {
    const int count = tokens(p);
    int shares = 1;  // warps to a row
    while (shares * 2 * count <= warps) shares *= 2;
    sync_block();
    for (int token = warp / shares; token < count; token += warps / shares) {
      const int row = x_row(p, token);
      float squares = 0.f, largest = 0.f;
      for (int column = 2 * (warp % shares * kWarp + lane); column < args.k; column += 2 * kWarp * shares) {
        float low, high;
        x_pair(row, column, low, high);
        squares = fma_(low, low, fma_(high, high, squares));
        if (args.norm) {
          low *= args.norm[column];
          high *= args.norm[column + 1];
        }
        largest = max_(largest, max_(abs_(low), abs_(high)));
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

  // Columns of a chunk to shared memory, as operands of A. A thread makes the 16 bytes that a lane loads: its columns
  // 2q, 2q + 1, 2q + 8, 2q + 9 of two steps.
  EDGELM_INLINE void stage(const SkinnyPlace& p) const {
    constexpr int kTogether = 4;  // rows whose loads are under way at the same time
    const int base = p.chunk * chunk_units * Unit::columns;
    const int pieces = (min_(args.k - base, args.chunk) + 31) / 32 * 4;
    const int count = tokens(p);
    for (int token = 0; token < count; token += kTogether) {
      for (int piece = thread(); piece < pieces; piece += block_threads()) {
        const int column = base + piece / 4 * 32 + piece % 4 * 2;
        float values[kTogether][8];
        EDGELM_UNROLL
        for (int t = 0; t < kTogether; ++t) {
          const int row = x_row(p, min_(token + t, count - 1));
          EDGELM_UNROLL
          for (int i = 0; i < 4; ++i) {
            if (column + 8 * i < args.k) x_pair(row, column + 8 * i, values[t][2 * i], values[t][2 * i + 1]);
            else values[t][2 * i] = values[t][2 * i + 1] = 0.f;
          }
        }
        EDGELM_UNROLL
        for (int t = 0; t < kTogether; ++t) {
          if (token + t < count) store_piece(piece, column, token + t, values[t]);
        }
      }
    }
  }

  EDGELM_INLINE void store_piece(int piece, int column, int token, float (&values)[8]) const {
    if (args.norm) {
      const float inverse = shared.inverse[token];
      EDGELM_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int at = column + i / 2 * 8 + i % 2;
        if (at < args.k) values[i] = values[i] * inverse * args.norm[at];
      }
    }
    if (args.round_scale != 0.f) {
      const float scale = shared.rounding[token];
      EDGELM_UNROLL
      for (int i = 0; i < 8; ++i) values[i] = to_float(from_float<e4m3>(values[i] / scale));
    }
    const Words4 packed = {pack2<A>(values[0], values[1]), pack2<A>(values[2], values[3]),
                           pack2<A>(values[4], values[5]), pack2<A>(values[6], values[7])};
    store16(shared.x + piece / 4 * SkinnyX<NB>::bytes + token / 8 * 512 + (token % 8 * 4 + piece % 4) * 16, packed);
  }

  // -- products -----------------------------------------------------------------------------------------------------------

  // `at`: number of the unit in the matrix; `x`: its columns in shared memory, for this lane.
  EDGELM_INLINE void consume(const Words4 (&unit)[Unit::loads], int at, const u8* x, int buffer,
                             float (&sums)[NB][4]) const {
    constexpr int kSteps = Unit::columns / 16;
    float part_sums[NB][4];
    float scale_low = 1.f, scale_high = 1.f;
    u32 zero_low = zero_pair<A, W>(middle<W>()), zero_high = zero_low;
    EDGELM_UNROLL
    for (int half = 0; half < kSteps / 2; ++half) {
      Words4 b[NB];
      EDGELM_UNROLL
      for (int n = 0; n < NB; ++n) b[n] = load16(x + half * SkinnyX<NB>::bytes + n * 512);
      EDGELM_UNROLL
      for (int s = 0; s < 2; ++s) {
        const int step = 2 * half + s;
        if constexpr (Is<W>::scaled) {
          if (step == 0 || fine) {
            const int group = int(u32(at * kSteps + step) * group_factor >> 32);
            const int block = buffer * at_a_time + own_block, index = group * kTileRows + lane / 4;
            scale_low = scale_at<W>(shared.scales + block * shared.scale_block, index);
            scale_high = scale_at<W>(shared.scales + block * shared.scale_block, index + 8);
            if (Is<W>::integer && args.zeros) {
              zero_low = zero_pair<A, W>(shared.zeros[block * shared.zero_block + index]);
              zero_high = zero_pair<A, W>(shared.zeros[block * shared.zero_block + index + 8]);
            }
            EDGELM_UNROLL
            for (int n = 0; n < NB; ++n) part_sums[n][0] = part_sums[n][1] = part_sums[n][2] = part_sums[n][3] = 0.f;
          }
        }
        u32 a[4];
        if constexpr (Unit::loads == 2) fragment<A, W>(unit[step], 0, 0, 0, a);
        else fragment<A, W>(unit[0], step, zero_low, zero_high, a);
        EDGELM_UNROLL
        for (int n = 0; n < NB; ++n) {
          const u32 operand[2] = {s ? b[n].z : b[n].x, s ? b[n].w : b[n].y};
          if constexpr (Is<W>::scaled) mma_16x8x16<A>(part_sums[n], a, operand);
          else mma_16x8x16<A>(sums[n], a, operand);
        }
        if constexpr (Is<W>::scaled) {
          if (step == kSteps - 1 || fine) {
            EDGELM_UNROLL
            for (int n = 0; n < NB; ++n) {
              sums[n][0] = fma_(part_sums[n][0], scale_low, sums[n][0]);
              sums[n][1] = fma_(part_sums[n][1], scale_low, sums[n][1]);
              sums[n][2] = fma_(part_sums[n][2], scale_high, sums[n][2]);
              sums[n][3] = fma_(part_sums[n][3], scale_high, sums[n][3]);
            }
          }
        }
      }
    }
  }

  // Adds the warps' sums and writes the results of an item.
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
      const int slot = first_slot(p.active) + p.tile * NB * 8 + token;
      put_pair<A>(args, slot, p.group * at_a_time + block, from / 4, low * factor, high * factor);
    }
  }
};

template <class A, class W, int NB> EDGELM_BODY void linear_skinny(const LinearArgs& args) {
  using Unit = SkinnyUnit<W>;
  constexpr int kAhead = Unit::ahead;
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
  if (any) {  // weights and scales are constant: they may be read before the kernel that makes x has ended
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
    SkinnyPlace following = place;
    my.next(following);
    const u8* next_from = my.source(following);
    const int next_count = my.count(following);
    if (place.chunk == 0) {
      SkinnyPlace item = place;
      my.next_item(item);
      my.copy_scales(item, 1 - item_buffer);
    }
    const bool moved = place.active != staged_active || place.tile != staged_tile;
    if (moved && (args.norm || args.round_scale != 0.f)) my.measure(place);
    if (moved || my.chunks > 1) {
      if (place.chunk > 0) sync_block();  // all have done with the columns before
      my.stage(place);
    }
    staged_active = place.active;
    staged_tile = place.tile;
    if constexpr (Is<W>::scaled) cp_async_wait<1>();
    sync_block();

    const int first = my.first_unit(place);
    const int rounds = (my.share(place) + kAhead - 1) / kAhead;
    const u8* x = my.shared.x + my.part * my.share(place) * (Unit::columns / 32) * SkinnyX<NB>::bytes + my.lane * 16;
    for (int round = 0; round < rounds; ++round) {
      const bool last = round == rounds - 1;
      const int done = round * kAhead;
      const u8* source = last ? next_from : from + (done + kAhead) * Unit::loads * kTileBytes;
      const int left = last ? next_count : count - done - kAhead;
      const int source_unit = last ? my.first_unit(following) : first + done + kAhead;
      EDGELM_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (done + i < count) {
          my.consume(buffer[i], first + done + i, x + (done + i) * (Unit::columns / 32) * SkinnyX<NB>::bytes,
                     item_buffer, sums);
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
    from = next_from;
    count = next_count;
  }
}

}  // namespace edgelm
