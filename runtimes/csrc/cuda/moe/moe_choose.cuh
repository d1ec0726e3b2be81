// Choice of experts, sorting of tokens by expert, and the weighted sum. See moe.cuh.
#pragma once

namespace edgelm {

// Choose the experts of one token, by a warp. Lane r < k gets the r-th most probable expert, its weight, and its place
// among the token's experts in the order of their indices. P experts per lane, `experts` <= 32 P.
// For equal probabilities the lower index comes first. NaN counts as less than any number; k experts are always chosen.
template <int P>
EDGELM_DEVICE void choose_experts(const float* logits, int experts, int k, bool normalize, int& expert, float& weight,
                                  int& place) {
  const int lane = thread() % kWarp;
  const float infinity = bits_to_float(0x7f800000u);
  float value[P], largest = -infinity, sum = 0.f;
  EDGELM_UNROLL
  for (int i = 0; i < P; ++i) {
    value[i] = lane * P + i < experts ? logits[lane * P + i] : -infinity;
    largest = max_(largest, value[i]);
  }
  largest = warp_max(largest);
  EDGELM_UNROLL
  for (int i = 0; i < P; ++i) {
    value[i] = lane * P + i < experts ? exp_(value[i] - largest) : 0.f;
    sum += value[i];
  }
  sum = warp_sum(sum);
  // Probabilities are not negative, so comparing their bits as integers compares the numbers.
  constexpr int kNan = -1, kNone = -2;
  int key[P];
  EDGELM_UNROLL
  for (int i = 0; i < P; ++i) {
    const float probability = value[i] / sum;
    key[i] = lane * P + i >= experts ? kNone : is_nan(probability) ? kNan : int(float_to_bits(probability));
  }
  expert = 0;
  weight = 0.f;
  for (int r = 0; r < k; ++r) {
    int best = key[0], index = 0;
    EDGELM_UNROLL
    for (int i = 1; i < P; ++i) {
      if (key[i] > best) {
        best = key[i];
        index = i;
      }
    }
    const int most = warp_max(best);
    const int winner = lowest_bit(ballot(best == most));
    const int found = shuffle(lane * P + index, winner);
    EDGELM_UNROLL
    for (int i = 0; i < P; ++i) {
      if (lane * P + i == found) key[i] = kNone;
    }
    if (lane == r) {
      expert = found;
      weight = most == kNan ? bits_to_float(0x7fffffffu) : bits_to_float(u32(most));
    }
  }
  if (normalize) {
    float total = 0.f;
    for (int r = 0; r < k; ++r) total += shuffle(weight, r);
    weight /= total;
  }
  place = 0;
  for (int r = 0; r < k; ++r) place += shuffle(expert, r) < expert;
}

EDGELM_DEVICE void put_entry(const MoeChooseArgs& args, int index, int expert, int first_slot, int slots) {
  store16(args.active + 4 * index, {u32(expert), u32(first_slot), u32(slots), 0});
}

// By warp 0: from the number of tokens of each expert (`counts`, shared memory) compute its first slot (`starts`). With
// `publish`, also write offsets and the list of experts that have tokens to global memory. P experts per lane.
template <int P>
EDGELM_DEVICE void scan_counts(const MoeChooseArgs& args, const int* counts, int* starts, bool publish) {
  const int lane = thread() % kWarp;
  int sum = 0, active = 0;
  EDGELM_UNROLL
  for (int i = 0; i < P; ++i) {
    const int count = lane * P + i < args.experts ? counts[lane * P + i] : 0;
    sum += count;
    active += count > 0;
  }
  int before = sum, active_before = active;
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int other = shuffle_up(before, delta), other_active = shuffle_up(active_before, delta);
    if (lane >= delta) {
      before += other;
      active_before += other_active;
    }
  }
  const int all_active = shuffle(active_before, kWarp - 1);
  if (publish) {
    if (lane == 0) {
      args.offsets[args.experts] = args.tokens * args.k;
      put_entry(args, 0, all_active, 0, 0);
    }
    for (int i = all_active + lane; i < min_(args.experts, args.tokens * args.k); i += kWarp) {
      put_entry(args, 1 + i, 0, 0, 0);
    }
  }
  before -= sum;
  active_before -= active;
  EDGELM_UNROLL
  for (int i = 0; i < P; ++i) {
    const int e = lane * P + i;
    if (e >= args.experts) continue;
    starts[e] = before;
    const int count = counts[e];
    if (publish) {
      args.offsets[e] = before;
      if (count > 0) put_entry(args, 1 + active_before++, e, before, count);
    }
    before += count;
  }
}

EDGELM_DEVICE void place_pair(const MoeChooseArgs& args, int token, int place, int slot, float weight) {
  args.row_map[slot] = token;
  args.slot_weights[slot] = weight;
  args.slot_of[i64(token) * args.k + place] = slot;
}

// Choose and sort up to 32 tokens in one block. Shared memory: 12 bytes per expert and 8 per (token, expert) pair.
template <int P> EDGELM_DEVICE void choose_all(const MoeChooseArgs& args, void* shared) {
  int* const bits = static_cast<int*>(shared);  // [experts] the tokens that chose it
  int* const counts = bits + args.experts;
  int* const starts = counts + args.experts;
  int* const chosen = starts + args.experts;  // [tokens, k] expert * kMaxChosen + place
  float* const weights = reinterpret_cast<float*>(chosen + args.tokens * args.k);
  const int warp = thread() / kWarp, lane = thread() % kWarp, pairs = args.tokens * args.k;
  for (int e = thread(); e < args.experts; e += block_threads()) bits[e] = 0;
  sync_block();
  for (int token = warp; token < args.tokens; token += block_threads() / kWarp) {
    int expert, place;
    float weight;
    choose_experts<P>(args.logits + i64(token) * args.experts, args.experts, args.k, args.normalize != 0, expert,
                      weight, place);
    if (lane < args.k) {
      atomic_add(bits + expert, int(1u << token));  // a token chooses an expert at most once, so this sets its bit
      chosen[token * args.k + lane] = expert * kMaxChosen + place;
      weights[token * args.k + lane] = weight;
    }
    sync_warp();
  }
  sync_block();
  for (int e = thread(); e < args.experts; e += block_threads()) counts[e] = count_bits(u32(bits[e]));
  sync_block();
  if (warp == 0) scan_counts<P>(args, counts, starts, true);
  sync_block();
  for (int i = thread(); i < pairs; i += block_threads()) {
    const int token = divide(i, args.k_divisor), expert = chosen[i] / kMaxChosen;
    const int before = count_bits(u32(bits[expert]) & ((1u << token) - 1));
    place_pair(args, token, chosen[i] % kMaxChosen, starts[expert] + before, weights[i]);
  }
}

// Up to 32 tokens in one block; fastest with a warp per token.
template <int P> EDGELM_BODY void moe_choose(const MoeChooseArgs& args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  choose_all<P>(args, shared_memory());
}

// Router and choice in one launch: the block that ends last has all logits. 16 bytes of shared memory are for its flag.
template <class A, int T, int N, int P> EDGELM_BODY void moe_route(const MoeRouteArgs& args) {
  u8* const shared = shared_memory() + 16;
  int* const flag = reinterpret_cast<int*>(shared_memory());
  if (router_block<A, T, N>(args.router, reinterpret_cast<float*>(shared), args.counter, flag)) {
    choose_all<P>(args.choose, shared);
  }
}

// For many tokens, 32 per block. The slots still lack the pairs of earlier blocks, which moe_place adds.
template <int P> EDGELM_BODY void moe_choose_many(const MoeChooseArgs& args) {
  int* const tokens = reinterpret_cast<int*>(shared_memory());
  const int bit = thread() / kWarp, lane = thread() % kWarp, token = block_x() * kChooseTokens + bit;
  for (int e = thread(); e < args.experts; e += block_threads()) tokens[e] = 0;
  sync_block();
  wait_for_previous_kernel();
  let_next_kernel_start();
  int expert = 0, place = 0;
  float weight = 0.f;
  const bool chooses = token < args.tokens && lane < args.k;
  if (token < args.tokens) {
    choose_experts<P>(args.logits + i64(token) * args.experts, args.experts, args.k, args.normalize != 0, expert,
                      weight, place);
  }
  if (chooses) atomic_add(tokens + expert, int(1u << bit));
  sync_block();
  for (int e = thread(); e < args.experts; e += block_threads()) {
    args.counts[i64(block_x()) * args.experts + e] = count_bits(u32(tokens[e]));
  }
  if (chooses) {
    const i64 at = i64(token) * args.k + place;
    args.chosen[at] = expert * kChooseTokens + count_bits(u32(tokens[expert]) & ((1u << bit) - 1));
    args.chosen_weights[at] = weight;
  }
}

// Compute the slots, 32 tokens per block. Every block sums all blocks' counts for itself: they are few and cached.
// Shared memory: 3 * 4 bytes per expert. At least as many threads as experts.
template <int P> EDGELM_BODY void moe_place(const MoeChooseArgs& args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  int* const counts = reinterpret_cast<int*>(shared_memory());  // [experts] sum over all blocks
  int* const before = counts + args.experts;                    // sum over the blocks before this one
  int* const starts = before + args.experts;
  for (int e = thread(); e < args.experts; e += block_threads()) counts[e] = before[e] = 0;
  sync_block();
  const int parts = block_threads() / args.experts, part = thread() / args.experts, e = thread() % args.experts;
  if (part < parts) {
    int sum = 0, sum_before = 0;
    for (int block = part; block < grid_x(); block += parts) {
      const int count = args.counts[i64(block) * args.experts + e];
      sum += count;
      sum_before += block < block_x() ? count : 0;
    }
    atomic_add(counts + e, sum);
    atomic_add(before + e, sum_before);
  }
  sync_block();
  if (thread() < kWarp) scan_counts<P>(args, counts, starts, block_x() == 0);
  sync_block();
  const int pairs = min_(kChooseTokens, args.tokens - block_x() * kChooseTokens) * args.k;
  for (int i = thread(); i < pairs; i += block_threads()) {
    const i64 at = i64(block_x()) * kChooseTokens * args.k + i;
    const int chosen = args.chosen[at], expert = chosen / kChooseTokens;
    const int slot = starts[expert] + before[expert] + chosen % kChooseTokens;
    const int token = divide(i, args.k_divisor);
    place_pair(args, block_x() * kChooseTokens + token, i - token * args.k, slot, args.chosen_weights[at]);
  }
}

// y = x + sum of weight * output, in the order of the experts' indices, which is the order of their slots. Four columns
// per thread (block_y), a token per block_x.
EDGELM_BODY void moe_combine(const MoeCombineArgs& args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int column = 4 * (block_y() * block_threads() + thread());
  if (column >= args.columns) return;
  const i64 at = i64(block_x()) * args.columns + column;
  Float4 sum = load_floats(args.x + at);
  for (int j = 0; j < args.k; ++j) {
    const int slot = args.slot_of[i64(block_x()) * args.k + j];
    const float weight = args.slot_weights[slot];
    const Float4 output = load_floats(args.outputs + i64(slot) * args.columns + column);
    EDGELM_UNROLL
    for (int i = 0; i < 4; ++i) sum.v[i] = fma_(weight, output.v[i], sum.v[i]);
  }
  store_floats(args.y + at, sum);
}

}  // namespace edgelm
