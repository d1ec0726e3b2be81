// The rows of x in linear_skinny: normed and rounded where asked for, in shared memory as 16-bit numbers.
#pragma once

#include "linear/skinny_work.cuh"

namespace edgelm {

// The parts of shared memory behind the stream's ring. host/operators/skinny.cc places them.
template <int NB> struct SkinnyShared {
  u8* x;            // [x_tile] rows of A
  float* sums;      // [2][warps][NB * 4][32]
  float* inverse;   // [NB * 8] of the norm
  float* rounding;  // [NB * 8] scales of x's rows
  float* partial;   // [NB * 8][warps][2]

  EDGELM_INLINE explicit SkinnyShared(const SkinnyPlan& plan)
      : x(shared_memory() + plan.x_at),
        sums(reinterpret_cast<float*>(shared_memory() + plan.sums_at)),
        inverse(reinterpret_cast<float*>(shared_memory() + plan.rows_at)),
        rounding(inverse + NB * 8),
        partial(rounding + NB * 8) {}
};

template <class A, int NB, bool EXPERTS> struct SkinnyRows {
  const SkinnyWork<EXPERTS>& work;
  const LinearArgs& args;
  const SkinnyShared<NB> shared;
  const int warps;

  EDGELM_INLINE explicit SkinnyRows(const SkinnyWork<EXPERTS>& w)
      : work(w), args(w.args), shared(w.plan), warps(block_threads() / kWarp) {}

  EDGELM_INLINE int x_row(const SkinnyPlace& p, int token) const {
    return source_row(args, work.first_token(p) + token);
  }
  // Whether x must be converted, normed or rounded before the mma.
  EDGELM_INLINE bool is_raw() const { return args.x_float || args.round_scale != 0.f; }

  // Load eight neighbouring numbers of a row.
  EDGELM_INLINE void x_eight(int row, int column, float (&to)[8]) const {
    const i64 at = i64(row) * args.k + column;
    if (args.x_float) {
      floats(static_cast<const float*>(args.x) + at, to);
    } else {
      const Words4 pairs = load16(static_cast<const A*>(args.x) + at);
      unpack2<A>(pairs.x, to[0], to[1]);
      unpack2<A>(pairs.y, to[2], to[3]);
      unpack2<A>(pairs.z, to[4], to[5]);
      unpack2<A>(pairs.w, to[6], to[7]);
    }
  }
  static EDGELM_INLINE void floats(const float* from, float (&to)[8]) {
    const Words4 low = load16(from), high = load16(from + 4);
    const u32 bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    EDGELM_UNROLL
    for (int i = 0; i < 8; ++i) to[i] = bits_to_float(bits[i]);
  }

  // Compute the norm's factor and the rounding scale of each row, by all threads.
  EDGELM_INLINE void measure(const SkinnyPlace& p) const {
    const int count = work.tokens(p);
    int shift = 0;  // 2^shift warps per row
    while ((count << (shift + 1)) <= warps) ++shift;
    const int shares = 1 << shift, own = work.warp & (shares - 1);
    sync_block();
    EDGELM_UNROLL_BY(1)
    for (int token = work.warp >> shift; token < count; token += warps >> shift) {
      const int row = x_row(p, token);
      float squares = 0.f, largest = 0.f;
      EDGELM_UNROLL_BY(1)
      for (int column = 8 * (own * kWarp + int(work.lane)); column < args.k; column += 8 * kWarp * shares) {
        float values[8], norm[8];
        x_eight(row, column, values);
        const bool normed = args.norm && args.round_scale < 0.f;  // the maxima are needed only then
        if (normed) floats(args.norm + column, norm);
        EDGELM_UNROLL
        for (int i = 0; i < 8; ++i) {
          squares = fma_(values[i], values[i], squares);
          largest = max_(largest, abs_(normed ? values[i] * norm[i] : values[i]));
        }
      }
      squares = warp_sum(squares);
      largest = warp_max(largest);
      if (work.lane == 0) {
        float* to = shared.partial + (token * warps + own) * 2;
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

  // Copy the columns of a chunk to shared memory, zeros behind the last.
  EDGELM_INLINE void stage(const SkinnyPlace& p) const {
    const int base = p.chunk * work.plan.chunk_columns;
    const int pieces = (min_(args.k - base, work.plan.chunk_columns) + 31) / 32 * 4;  // of 8 columns
    const int count = work.tokens(p);
    constexpr int kBatch = NB > 1 ? 8 : EXPERTS ? 2 : 4;  // rows that are read before the first is written
    EDGELM_UNROLL_BY(1)
    for (int piece = thread(); piece < pieces; piece += block_threads()) {
      const int column = base + piece * 8;
      u8* to = shared.x + piece * 16;
      if (is_raw()) {
        EDGELM_UNROLL_BY(1)
        for (int token = 0; token < count; ++token) {
          stage_eight(x_row(p, token), token, column, to + token * work.plan.pitch);
        }
        continue;
      }
      EDGELM_UNROLL_BY(1)
      for (int first = 0; first < count; first += kBatch) {
        Words4 words[kBatch];
        EDGELM_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          words[i] = {0, 0, 0, 0};
          if (first + i < count && column < args.k) {
            words[i] = load16(static_cast<const A*>(args.x) + i64(x_row(p, first + i)) * args.k + column);
          }
        }
        EDGELM_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          if (first + i < count) store16(to + (first + i) * work.plan.pitch, words[i]);
        }
      }
    }
  }

  EDGELM_INLINE void stage_eight(int row, int token, int column, u8* to) const {
    float values[8] = {}, norm[8];
    if (column < args.k) {
      x_eight(row, column, values);
      if (args.norm) {
        floats(args.norm + column, norm);
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
};

}  // namespace edgelm
