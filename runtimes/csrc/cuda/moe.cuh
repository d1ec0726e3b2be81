// Sparse expert dispatch: router, choice of experts, sorting by expert, and the weighted sum of what they computed.
//
// The experts' own products are grouped launches of linear.cuh. Around them, for M tokens and E experts of width D:
//
//   router    logits = RMSNorm(x) . router^T in float32, and RMSNorm(x) as the experts take it
//   choose    softmax over all experts, the k most probable, and where each (token, expert) pair goes: its *slot*.
//             Slots are in the order of experts, within one expert in the order of tokens.
//   combine   y = x + the weighted sum, in the order of the experts' indices; up to 32 tokens `down` does the experts'
//             second product as well, and nothing of it passes through memory
//
// Up to 32 tokens one block chooses and sorts: the last of the router's to end (`route`), or that of a kernel of its own
// (`choose`). More are chosen by 32s (`choose_many`), and `place` gives each its slot.
// Everything is deterministic, and nothing about a launch depends on which experts are chosen.
#pragma once

#include "device.cuh"

namespace edgelm {

constexpr int kChooseTokens = 32;  // of one block: an expert's tokens are the bits of one word
constexpr int kMaxChosen = 16;
constexpr int kMaxExperts = 256;

struct MoeRouterArgs {
  const float* x;       // [tokens, columns]
  const float* norm;    // [columns]
  const float* router;  // [experts, columns]
  float* logits;        // [tokens, experts]
  void* normed;         // [tokens, columns] of A: RMSNorm(x)
  int tokens, columns, experts;
  float epsilon;
};

struct MoeChooseArgs {
  const float* logits;    // [tokens, experts]
  int* chosen;            // [tokens, k], from choose_many to place: expert * 32 + rank among the block's tokens of it
  float* chosen_weights;  // [tokens, k], likewise
  int* counts;            // [blocks of 32 tokens, experts], likewise
  int* offsets;           // [experts + 1]: where an expert's slots begin
  int* row_map;           // [slots]: the token
  float* slot_weights;    // [slots]
  int* slot_of;           // [tokens, k]: a token's slots, ascending
  int* active;            // [1 + min(experts, slots)]: how many experts have tokens, and which, ascending
  int tokens, experts, k, normalize;
};

struct MoeRouteArgs {
  MoeRouterArgs router;
  MoeChooseArgs choose;
  int* counter;  // 0; left as 0
};

struct MoeCombineArgs {
  const float* x;             // [tokens, columns]
  const float* outputs;       // [slots, columns]
  const float* slot_weights;  // [slots]
  const int* slot_of;         // [tokens, k], ascending
  float* y;                   // [tokens, columns]; may be x
  int tokens, columns, k;
};

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

// A block has `T` tokens (block_y) and `N` experts (block_x), its threads share the columns: with few tokens the time
// is that of one access to memory, and all loads are on their way at once. The norm's factor is taken out of the sum
// over columns, so that sum of squares and products need one pass and one barrier. Threads: any multiple of 32.
// With a counter: whether this block is the last, and sees all logits.
template <class A, int T, int N>
EDGELM_DEVICE bool router_block(const MoeRouterArgs& args, float* scratch, int* counter, int* flag) {
  const int first_token = block_y() * T, first_expert = block_x() * N, columns = args.columns;
  float squares[T] = {}, sums[T][N] = {};
  bool waited = false;
  for (int c = 4 * thread(); c < columns || !waited; c += 4 * block_threads()) {
    const bool inside = c < columns;
    Float4 weights[N];
    EDGELM_UNROLL
    for (int n = 0; n < N; ++n) {
      const bool real = inside && first_expert + n < args.experts;
      weights[n] = real ? load_floats_stream(args.router + i64(first_expert + n) * columns + c) : Float4{};
    }
    const Float4 norm = inside ? load_floats(args.norm + c) : Float4{};
    if (!waited) wait_for_previous_kernel();  // weights do not come from it
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
  let_next_kernel_start();

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
  if (counter && warp == 0) {  // which wrote the logits
    static_assert(T * N <= kWarp, "one warp writes the logits");
    fence_device();
    sync_warp();
    if (thread() == 0) {
      const bool last = atomic_add(counter, 1) == grid_x() * grid_y() - 1;
      if (last) *counter = 0;
      *flag = last;
    }
  }
  // Each block of a token writes its share of the columns.
  const int share = (columns / 4 + grid_x() - 1) / grid_x() * 4;
  const int end = min_(columns, (block_x() + 1) * share);
  for (int c = block_x() * share + 4 * thread(); c < end; c += 4 * block_threads()) {
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

constexpr int kTileTokens = 32, kTileExperts = 64, kTileColumns = 64, kTileThreads = 256;
constexpr int kTileShared = kTileColumns * (kTileTokens + kTileExperts) * 4;

// Where element (column, i) of a transposed operand with `width` rows lies: groups of 4 are permuted by the column, so
// that neither the threads of a warp that write 4 rows of 8 groups of columns meet in a bank, nor those that read.
template <int width> EDGELM_DEVICE int tile_place(int column, int i) {
  return column * width + ((i / 4 ^ column / 4 % 8) * 4 + i % 4);
}

// A block has 32 tokens (block_x) and all experts, 64 at a time. Both operands lie transposed in shared memory; a
// thread has 4 x 4 results of every second column, the other half of the block the other columns.
template <class A> EDGELM_BODY void moe_router_tiled(const MoeRouterArgs& args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  float* const xs = reinterpret_cast<float*>(shared_memory());  // [kTileColumns][kTileTokens]: x * norm
  float* const ws = xs + kTileColumns * kTileTokens;            // [kTileColumns][kTileExperts]
  const int first_token = block_x() * kTileTokens, columns = args.columns;
  const int half = thread() / 128, t0 = thread() % 128 / 16 * 4, e0 = thread() % 16 * 4;
  // Loading: 8 threads have a row's 64 columns in pairs of 4; rows r, r + 32.
  const int load_row = thread() / 8, load_column = thread() % 8 * 4;
  const bool row_real = first_token + load_row < args.tokens;
  const float* const x_row = args.x + i64(row_real ? first_token + load_row : 0) * columns;

  float inverse = 0.f;  // of token load_row
  for (int first_expert = 0; first_expert < args.experts; first_expert += kTileExperts) {
    float sums[4][4] = {};
    float squares = 0.f;
    Float4 x_next[2], w_next[2][2];
    const auto fetch = [&](int from) {
      EDGELM_UNROLL
      for (int part = 0; part < 2; ++part) {
        const int c = from + load_column + 32 * part;
        const bool inside = c < columns;
        Float4 x = inside && row_real ? load_floats(x_row + c) : Float4{};
        const Float4 norm = inside ? load_floats(args.norm + c) : Float4{};
        EDGELM_UNROLL
        for (int i = 0; i < 4; ++i) {
          squares = fma_(x.v[i], x.v[i], squares);
          x.v[i] *= norm.v[i];
        }
        x_next[part] = x;
        EDGELM_UNROLL
        for (int row = 0; row < 2; ++row) {
          const int e = first_expert + load_row + 32 * row;
          w_next[row][part] = inside && e < args.experts ? load_floats(args.router + i64(e) * columns + c) : Float4{};
        }
      }
    };
    fetch(0);
    for (int from = 0; from < columns; from += kTileColumns) {
      sync_block();  // the columns before have been read
      EDGELM_UNROLL
      for (int part = 0; part < 2; ++part) {
        EDGELM_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int c = load_column + 32 * part + i;
          xs[tile_place<kTileTokens>(c, load_row)] = x_next[part].v[i];
          ws[tile_place<kTileExperts>(c, load_row)] = w_next[0][part].v[i];
          ws[tile_place<kTileExperts>(c, load_row + 32)] = w_next[1][part].v[i];
        }
      }
      sync_block();
      if (from + kTileColumns < columns) fetch(from + kTileColumns);
      EDGELM_UNROLL
      for (int pair = 0; pair < kTileColumns / 2; ++pair) {
        const int c = 2 * pair + half;
        const Float4 x = load_floats(xs + c * kTileTokens + (t0 / 4 ^ pair / 2 % 8) * 4);
        const Float4 w = load_floats(ws + c * kTileExperts + (e0 / 4 ^ pair / 2 % 8) * 4);
        EDGELM_UNROLL
        for (int t = 0; t < 4; ++t) {
          EDGELM_UNROLL
          for (int e = 0; e < 4; ++e) sums[t][e] = fma_(x.v[t], w.v[e], sums[t][e]);
        }
      }
    }
    // The 8 threads of a row are neighbours.
    for (int mask = 1; mask < 8; mask *= 2) squares += shuffle_xor(squares, mask);
    inverse = rsqrt_(squares / float(columns) + args.epsilon);
    // The second half hands its sums over: [tokens][experts], then the tokens' factors.
    sync_block();
    float* const factors = xs + kTileTokens * kTileExperts;
    if (half == 1) {
      EDGELM_UNROLL
      for (int t = 0; t < 4; ++t) {
        store_floats(xs + (t0 + t) * kTileExperts + e0, {{sums[t][0], sums[t][1], sums[t][2], sums[t][3]}});
      }
    }
    if (thread() % 8 == 0) factors[load_row] = inverse;
    sync_block();
    if (half == 0) {
      EDGELM_UNROLL
      for (int t = 0; t < 4; ++t) {
        const Float4 other = load_floats(xs + (t0 + t) * kTileExperts + e0);
        if (first_token + t0 + t >= args.tokens) continue;
        EDGELM_UNROLL
        for (int e = 0; e < 4; ++e) {
          if (first_expert + e0 + e >= args.experts) continue;
          args.logits[i64(first_token + t0 + t) * args.experts + first_expert + e0 + e] =
              (sums[t][e] + other.v[e]) * factors[t0 + t];
        }
      }
    }
    sync_block();
  }
  if (!row_real) return;
  A* const normed = static_cast<A*>(args.normed) + i64(first_token + load_row) * columns;
  for (int c = load_column; c < columns; c += 32) {
    store_as(normed + c, normed_floats(load_floats(x_row + c), inverse, load_floats(args.norm + c)));
  }
}

}  // namespace edgelm

#include "moe_choose.cuh"
#include "moe_down.cuh"
