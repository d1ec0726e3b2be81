// Sparse MoE layer without the experts' matmuls: router, choice of experts, sorting of tokens by expert, weighted sum.
//
// The experts' matmuls are grouped launches of linear.cuh. Around them, for M tokens, E experts and D columns:
//
//   router    logits = RMSNorm(x) . router^T in float32, and RMSNorm(x) in the type that the experts take
//   choose    softmax over all experts, top k, and a *slot* for each (token, expert) pair. Slots are ordered by expert,
//             and by token within an expert
//   combine   y = x + weighted sum of the experts' results, in the order of the experts' indices. Up to 32 tokens,
//             `down` does the experts' down matmul too, so that its results need not go through memory
//
// Up to 32 tokens one block chooses and sorts: the block of the router that ends last (`route`), or that of a separate
// kernel (`choose`). With more tokens, blocks of 32 choose (`choose_many`) and `place` computes the slots.
// All results are deterministic, and no launch parameter depends on which experts are chosen.
#pragma once

#include "device.cuh"
#include "moe/moe_args.cuh"

namespace edgelm {

constexpr int kChooseTokens = 32;  // per block: the tokens of an expert are bits of one word
constexpr int kMaxChosen = 16;
constexpr int kMaxExperts = 256;

// -- router: few tokens -----------------------------------------------------------------------------------------------

struct Float4 { float v[4]; };

EDGELM_DEVICE Float4 load_floats(const float* p) {
  const Words4 w = load16(p);
  return {{bits_to_float(w.x), bits_to_float(w.y), bits_to_float(w.z), bits_to_float(w.w)}};
}
EDGELM_DEVICE Float4 load_floats_stream(const float* p) {
  const Words4 w = load16_stream(p);
  return {{bits_to_float(w.x), bits_to_float(w.y), bits_to_float(w.z), bits_to_float(w.w)}};
}
EDGELM_DEVICE void store_floats(float* p, const Float4& x) {
  store16(p, {float_to_bits(x.v[0]), float_to_bits(x.v[1]), float_to_bits(x.v[2]), float_to_bits(x.v[3])});
}
template <class A> EDGELM_DEVICE void store_as(A* p, const Float4& x) {
  if constexpr (Same<A, float>::value) store_floats(p, x);
  else store8(p, {pack2<A>(x.v[0], x.v[1]), pack2<A>(x.v[2], x.v[3])});
}

EDGELM_DEVICE Float4 normed_floats(const Float4& x, float inverse, const Float4& norm) {
  return {{x.v[0] * inverse * norm.v[0], x.v[1] * inverse * norm.v[1], x.v[2] * inverse * norm.v[2],
           x.v[3] * inverse * norm.v[3]}};
}

// A block has `T` tokens (block_y) and `N` experts (block_x); its threads divide the columns among them. With few
// tokens the time is that of one memory access, so all loads are issued at once. The norm's factor is applied after the
// sum over columns, so that sum of squares and dot products need one pass and one barrier. Threads: any multiple of 32.
// With a counter, returns whether this block is the last to finish and so sees all logits.
template <class A, int T, int N>
EDGELM_DEVICE bool router_block(const MoeRouterArgs& args, float* scratch, int* counter, int* flag) {
  const int first_token = block_y() * T, first_expert = block_x() * N, columns = args.columns;
  float squares[T] = {}, sums[T][N] = {};
  bool waited = false;
  let_next_kernel_start();
  for (int c = 4 * thread(); c < columns || !waited; c += 4 * block_threads()) {
    const bool inside = c < columns;
    Float4 weights[N];
    EDGELM_UNROLL
    for (int n = 0; n < N; ++n) {
      const bool real = inside && first_expert + n < args.experts;
      weights[n] = real ? load_floats_stream(args.router + i64(first_expert + n) * columns + c) : Float4{};
    }
    const Float4 norm = inside ? load_floats(args.norm + c) : Float4{};
    if (!waited) wait_for_previous_kernel();  // the router's weights do not depend on it
    waited = true;
    EDGELM_UNROLL
    for (int t = 0; t < T; ++t) {
      const bool real = inside && first_token + t < args.tokens;
      const Float4 x = real ? load_floats(args.x + i64(first_token + t) * columns + c) : Float4{};
      EDGELM_UNROLL
      for (int i = 0; i < 4; ++i) {
        squares[t] = fma_(x.v[i], x.v[i], squares[t]);
        const float scaled = x.v[i] * norm.v[i];
        EDGELM_UNROLL
        for (int n = 0; n < N; ++n) sums[t][n] = fma_(scaled, weights[n].v[i], sums[t][n]);
      }
    }
  }

  // Sums of each warp, in scratch: [warps][T][N + 1].
  const int warp = thread() / kWarp, warps = block_threads() / kWarp;
  EDGELM_UNROLL
  for (int t = 0; t < T; ++t) {
    EDGELM_UNROLL
    for (int n = 0; n <= N; ++n) {
      const float sum = warp_sum(n < N ? sums[t][n < N ? n : 0] : squares[t]);
      if (thread() % kWarp == 0) scratch[(warp * T + t) * (N + 1) + n] = sum;
    }
  }
  sync_block();
  float inverse[T];
  EDGELM_UNROLL
  for (int t = 0; t < T; ++t) {
    float total = 0.f;
    for (int w = 0; w < warps; ++w) total += scratch[(w * T + t) * (N + 1) + N];
    inverse[t] = rsqrt_(total / float(columns) + args.epsilon);
  }
  if (thread() < T * N) {
    const int t = thread() / N, n = thread() % N;
    float total = 0.f, factor = 0.f;
    for (int w = 0; w < warps; ++w) total += scratch[(w * T + t) * (N + 1) + n];
    EDGELM_UNROLL
    for (int i = 0; i < T; ++i) factor = i == t ? inverse[i] : factor;
    if (first_token + t < args.tokens && first_expert + n < args.experts) {
      args.logits[i64(first_token + t) * args.experts + first_expert + n] = total * factor;
    }
  }
  if (counter && warp == 0) {  // warp 0 wrote the logits
    static_assert(T * N <= kWarp, "one warp writes the logits");
    fence_device();
    sync_warp();
    if (thread() == 0) {
      const bool last = atomic_add(counter, 1) == grid_x() * grid_y() - 1;
      if (last) *counter = 0;
      *flag = last;
    }
  }
  // Each block of a token writes its share of the normed columns.
  const int end = min_(columns, (block_x() + 1) * args.share);
  for (int c = block_x() * args.share + 4 * thread(); c < end; c += 4 * block_threads()) {
    const Float4 norm = load_floats(args.norm + c);
    EDGELM_UNROLL
    for (int t = 0; t < T; ++t) {
      if (first_token + t >= args.tokens) continue;
      const i64 at = i64(first_token + t) * columns + c;
      store_as(static_cast<A*>(args.normed) + at, normed_floats(load_floats(args.x + at), inverse[t], norm));
    }
  }
  if (!counter) return false;
  sync_block();
  fence_device();
  return *flag != 0;
}

template <class A, int T, int N> EDGELM_BODY void moe_router(const MoeRouterArgs& args) {
  router_block<A, T, N>(args, reinterpret_cast<float*>(shared_memory()), nullptr, nullptr);
}

// -- router: many tokens ----------------------------------------------------------------------------------------------

constexpr int kRouterExperts = 64, kRouterColumns = 64, kRouterThreads = 256;  // of a tile

// Offset of element (column, i) of a transposed operand with `width` rows. Groups of 4 are permuted by the column, so
// that the threads of a warp, which write groups of columns of a row, mostly access different banks.
template <int width> EDGELM_DEVICE int tile_place(int column, int i) {
  constexpr int kMask = width / 4 < 8 ? width / 4 - 1 : 7;
  return column * width + ((i / 4 ^ (column / 4 & kMask)) * 4 + i % 4);
}

// A block has R = 32, 16 or 8 tokens (block_x) and all experts, 64 at a time. Both operands are transposed in shared
// memory. A thread computes 4 x 4 results over every (64 / R)th column: 64 / R parts of the block divide the columns.
// Shared memory: [64][R] x * norm, [64][64] router; then [parts - 1][R][64] sums and [R] factors of tokens.
template <class A, int R> EDGELM_BODY void moe_router_tiled(const MoeRouterArgs& args) {
  constexpr int kParts = 64 / R, kPartThreads = kRouterThreads / kParts, kRowLoads = kRouterColumns / 4;
  constexpr int kXLoads = (R * kRowLoads + kRouterThreads - 1) / kRouterThreads;
  constexpr int kWLoads = kRouterExperts * kRowLoads / kRouterThreads;
  wait_for_previous_kernel();
  let_next_kernel_start();
  float* const xs = reinterpret_cast<float*>(shared_memory());
  float* const ws = xs + kRouterColumns * R;
  float* const factors = ws + kRouterColumns * kRouterExperts - R;
  const int first_token = block_x() * R, columns = args.columns;
  const int part = thread() / kPartThreads, t0 = thread() % kPartThreads / 16 * 4, e0 = thread() % 16 * 4;
  // Loading: 16 neighbouring threads load 64 columns of a row.
  const int load_row = thread() / kRowLoads, load_column = thread() % kRowLoads * 4;
  constexpr int kLoadRows = kRouterThreads / kRowLoads;

  for (int first_expert = 0; first_expert < args.experts; first_expert += kRouterExperts) {
    float sums[4][4] = {}, squares[kXLoads] = {};
    Float4 x_next[kXLoads], w_next[kWLoads];
    const auto fetch = [&](int from) {
      const int c = from + load_column;
      const bool inside = c < columns;
      const Float4 norm = inside ? load_floats(args.norm + c) : Float4{};
      EDGELM_UNROLL
      for (int j = 0; j < kXLoads; ++j) {
        const int row = load_row + kLoadRows * j, token = first_token + row;
        Float4 x = inside && row < R && token < args.tokens ? load_floats(args.x + i64(token) * columns + c) : Float4{};
        EDGELM_UNROLL
        for (int i = 0; i < 4; ++i) {
          squares[j] = fma_(x.v[i], x.v[i], squares[j]);
          x.v[i] *= norm.v[i];
        }
        x_next[j] = x;
      }
      EDGELM_UNROLL
      for (int j = 0; j < kWLoads; ++j) {
        const int e = first_expert + load_row + kLoadRows * j;
        w_next[j] = inside && e < args.experts ? load_floats(args.router + i64(e) * columns + c) : Float4{};
      }
    };
    fetch(0);
    for (int from = 0; from < columns; from += kRouterColumns) {
      sync_block();  // the previous columns have been read
      EDGELM_UNROLL
      for (int i = 0; i < 4; ++i) {
        EDGELM_UNROLL
        for (int j = 0; j < kXLoads; ++j) {
          const int row = load_row + kLoadRows * j;
          if (row < R) xs[tile_place<R>(load_column + i, row)] = x_next[j].v[i];
        }
        EDGELM_UNROLL
        for (int j = 0; j < kWLoads; ++j) {
          ws[tile_place<kRouterExperts>(load_column + i, load_row + kLoadRows * j)] = w_next[j].v[i];
        }
      }
      sync_block();
      if (from + kRouterColumns < columns) fetch(from + kRouterColumns);
      EDGELM_UNROLL
      for (int i = 0; i < kRouterColumns / kParts; ++i) {
        const int c = i * kParts + part;
        const Float4 x = load_floats(xs + tile_place<R>(c, t0));
        const Float4 w = load_floats(ws + tile_place<kRouterExperts>(c, e0));
        EDGELM_UNROLL
        for (int t = 0; t < 4; ++t) {
          EDGELM_UNROLL
          for (int e = 0; e < 4; ++e) sums[t][e] = fma_(x.v[t], w.v[e], sums[t][e]);
        }
      }
    }
    sync_block();
    // The other parts write their sums to shared memory.
    if (part > 0) {
      EDGELM_UNROLL
      for (int t = 0; t < 4; ++t) {
        store_floats(xs + ((part - 1) * R + t0 + t) * kRouterExperts + e0,
                     {{sums[t][0], sums[t][1], sums[t][2], sums[t][3]}});
      }
    }
    EDGELM_UNROLL
    for (int j = 0; j < kXLoads; ++j) {
      float sum = squares[j];
      for (int mask = 1; mask < kRowLoads; mask *= 2) sum += shuffle_xor(sum, mask);
      const int row = load_row + kLoadRows * j;
      if (load_column == 0 && row < R) factors[row] = rsqrt_(sum / float(columns) + args.epsilon);
    }
    sync_block();
    if (part == 0) {
      EDGELM_UNROLL
      for (int t = 0; t < 4; ++t) {
        EDGELM_UNROLL
        for (int p = 0; p < kParts - 1; ++p) {
          const Float4 other = load_floats(xs + (p * R + t0 + t) * kRouterExperts + e0);
          EDGELM_UNROLL
          for (int e = 0; e < 4; ++e) sums[t][e] += other.v[e];
        }
        if (first_token + t0 + t >= args.tokens) continue;
        EDGELM_UNROLL
        for (int e = 0; e < 4; ++e) {
          if (first_expert + e0 + e >= args.experts) continue;
          args.logits[i64(first_token + t0 + t) * args.experts + first_expert + e0 + e] = sums[t][e] * factors[t0 + t];
        }
      }
    }
  }
  for (int row = load_row; row < R && first_token + row < args.tokens; row += kLoadRows) {
    const float inverse = factors[row];
    const i64 at = i64(first_token + row) * columns;
    for (int c = load_column; c < columns; c += kRouterColumns) {
      const Float4 x = load_floats(args.x + at + c), norm = load_floats(args.norm + c);
      store_as(static_cast<A*>(args.normed) + at + c, normed_floats(x, inverse, norm));
    }
  }
}

}  // namespace edgelm

#include "moe/moe_choose.cuh"
#include "moe/moe_down.cuh"
