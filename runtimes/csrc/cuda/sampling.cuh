// Sampling: what the host needs to know of a row of logits, found on the device so that they need not be copied.
//
// The host chooses the token (edgelm/generation/sampling.py): its arithmetic is written once, and a seed gives the same
// tokens on every runtime. It almost always needs the most likely tokens only, or sums. So the device returns
//   - the shortlist: all tokens whose logit is above a bound, as many as fit, with their logits, exactly;
//   - for each segment of the vocabulary the sum of exp((logit - top) / temperature), as an integer, so that it does not
//     depend on the order of addition. Exponentials differ from the host's by their rounding, a known limit.
// The host takes the token if these determine it, whatever the other logits are; else it copies the logits.
//
// Two kernels: sample_parts finds the highest logits of parts of a row, sample_rows merges them, and its other blocks sum.
// Nothing is added atomically. The k-th highest of the logits in the registers of a block is found by bisection of their
// bits: a histogram would count most of them in a few bins.
#pragma once

#include "embedding.cuh"
#include "sampling_args.cuh"

namespace edgelm {

// Shared memory, in words.
constexpr int kBestAt = 0, kCountsAt = 2 * kWarp, kScanAt = 4 * kWarp, kLargestAt = 5 * kWarp;
static_assert(4 * (kLargestAt + 2 * kWarp) <= kSamplingShared, "all of it");

// A key that is larger for a larger logit and equal for equal ones (0 and -0). NaN has 0, which is less than all others.
EDGELM_DEVICE u32 key_of(float x) {
  if (is_nan(x)) return 0;
  const u32 bits = float_to_bits(x);
  if (bits == 0x80000000u) return bits;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
EDGELM_DEVICE float value_of(u32 key) { return bits_to_float(key >> 31 ? key & 0x7fffffffu : ~key); }

constexpr u32 kLowestKey = 0x007fffffu;  // of minus infinity
constexpr u32 kNanKey = 0xffffffffu;

EDGELM_DEVICE int* sampling_shared(int at) { return reinterpret_cast<int*>(shared_memory()) + at; }

// The largest x of all threads. `turn`: 0, 1, 2 for calls that follow each other.
EDGELM_DEVICE u32 block_largest(u32 x, int turn) {
  int* scratch = sampling_shared(kLargestAt + turn * kWarp);
  const int largest = warp_max(int(x ^ 0x80000000u));
  if (thread() % kWarp == 0) scratch[thread() / kWarp] = largest;
  sync_block();
  return u32(warp_max(scratch[min_(thread() % kWarp, block_threads() / kWarp - 1)])) ^ 0x80000000u;
}

// The sum of x over all threads. Calls that follow each other alternate between turns 0 and 1: a block is at most one
// barrier apart, so nobody reads what the next call writes.
EDGELM_DEVICE int block_count(int x, int turn) {
  int* scratch = sampling_shared(kCountsAt + turn * kWarp);
  const int sum = warp_sum(x);
  if (thread() % kWarp == 0) scratch[thread() / kWarp] = sum;
  sync_block();
  return warp_sum(thread() % kWarp < block_threads() / kWarp ? scratch[thread() % kWarp] : 0);
}

// The sum of x over the threads before this one.
EDGELM_DEVICE int block_before(int x) {
  int* scratch = sampling_shared(kScanAt);
  int sum = x;
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int other = shuffle_up(sum, delta);
    if (thread() % kWarp >= delta) sum += other;
  }
  if (thread() % kWarp == kWarp - 1) scratch[thread() / kWarp] = sum;
  sync_block();
  int before = sum - x;
  for (int warp = 0; warp < thread() / kWarp; ++warp) before += scratch[warp];
  return before;
}

// A bound that at most `most` of the block's keys exceed, and as many as ties allow; 0 if there are no more than `most`.
EDGELM_DEVICE u32 bound_of(const u32 (&keys)[kSamplingKeys], int most) {
  u32 bound = 0;  // more than `most` keys are at least as large, or it is 0
  for (int bit = 31; bit >= 0; --bit) {
    const u32 trial = bound | 1u << bit;
    int mine = 0;
    EDGELM_UNROLL
    for (int j = 0; j < kSamplingKeys; ++j) mine += keys[j] >= trial;
    const int count = block_count(mine, bit % 2);
    if (count == most) return trial - 1;
    if (count > most) bound = trial;
  }
  return bound;
}

EDGELM_DEVICE int count_above(const u32 (&keys)[kSamplingKeys], u32 bound) {
  int count = 0;
  EDGELM_UNROLL
  for (int j = 0; j < kSamplingKeys; ++j) count += keys[j] > bound;
  return count;
}

// As edgelm/generation/sampling.py: penalise. The multiplication must not be fused with a later subtraction.
EDGELM_DEVICE float penalised(float x, float penalty) { return x < 0.f ? multiply_rounded(x, penalty) : x / penalty; }

// Grid: (parts, rows). The tokens of a part are spread over the vocabulary, since neighbours are often alike.
template <class A> EDGELM_BODY void sample_parts(const SamplingArgs& args) {
  static_assert(Same<A, float>::value, "logits are float32");
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int row = block_y();
  const SamplingRow how = args.how[row];
  const float* logits = args.logits + i64(row) * args.n;
  u32* seen = args.seen + i64(row) * args.words;
  u32 keys[kSamplingKeys];
  u32 highest = 0;
  float top = 0.f;
  int best = -1;
  EDGELM_UNROLL
  for (int j = 0; j < kSamplingKeys; ++j) {
    const int id = (j * args.part_count + block_x()) * kSamplingThreads + thread();
    keys[j] = 0;
    if (id >= args.n) continue;
    float x = logits[id];
    const u32 raw = is_nan(x) ? kNanKey : key_of(x);
    highest = raw > highest ? raw : highest;
    if (how.penalty != 1.f) {
      // The 32 tokens of a word are those of a warp, so no other block has this word.
      const u32 word = seen[id / 32];
      if (id == how.seen) seen[id / 32] = word | 1u << id % 32;
      if (id == how.seen || (word >> id % 32 & 1)) x = penalised(x, how.penalty);
    }
    keys[j] = key_of(x);
    if (keys[j] != 0 && is_better(x, id, top, best)) {
      top = x;
      best = id;
    }
  }
  block_best(top, best, reinterpret_cast<float*>(sampling_shared(kBestAt)));
  highest = block_largest(highest, 0);
  u32 bound = 0;
  if (how.wants & kWantsShortlist) {
    bound = bound_of(keys, args.slots);
    const int mine = count_above(keys, bound);
    int place = block_before(mine);
    const i64 first = (i64(row) * args.part_count + block_x()) * args.slots;
    EDGELM_UNROLL
    for (int j = 0; j < kSamplingKeys; ++j) {
      if (keys[j] <= bound) continue;
      args.keys[first + place] = keys[j];
      args.ids[first + place] = (j * args.part_count + block_x()) * kSamplingThreads + thread();
      ++place;
    }
    const int used = block_count(mine, 0);
    for (int i = used + thread(); i < args.slots; i += kSamplingThreads) args.keys[first + i] = 0;
  }
  if (thread() == 0) args.parts[i64(row) * args.part_count + block_x()] = {top, best, highest, bound};
}

// List the row's highest logits out of the parts' slots. `bound`: the highest bound of a part.
EDGELM_DEVICE void list_row(const SamplingArgs& args, u32& bound, int& count, u8* to) {
  const int row = block_y(), slots = args.part_count * args.slots;
  const i64 first = i64(row) * slots;
  u32 keys[kSamplingKeys];
  EDGELM_UNROLL
  for (int j = 0; j < kSamplingKeys; ++j) {
    const int slot = j * kShortlistThreads + thread();
    const u32 key = slot < slots ? args.keys[first + slot] : 0;
    keys[j] = key > bound ? key : 0;
  }
  const u32 higher = bound_of(keys, kShortlist);
  bound = higher > bound ? higher : bound;
  const int mine = count_above(keys, bound);
  int place = block_before(mine);
  count = block_count(mine, 0);
  float* logits = reinterpret_cast<float*>(to);
  i32* ids = reinterpret_cast<i32*>(to + 4 * kShortlist);
  EDGELM_UNROLL
  for (int j = 0; j < kSamplingKeys; ++j) {
    if (keys[j] <= bound) continue;
    logits[place] = value_of(keys[j]);
    ids[place] = args.ids[first + j * kShortlistThreads + thread()];
    ++place;
  }
}

// Sum a segment's exponentials. `top`: the row's highest logit after the penalty.
EDGELM_DEVICE void sum_segment(const SamplingArgs& args, const SamplingRow& how, float top, u8* to) {
  const int row = block_y(), segment = block_x() - 1, id = segment * kSegment + thread();
  u64 weight = 0;
  if (id < args.n) {
    float x = args.logits[i64(row) * args.n + id];
    if (how.penalty != 1.f && (args.seen[i64(row) * args.words + id / 32] >> id % 32 & 1)) {
      x = penalised(x, how.penalty);
    }
    const float exponential = exp_((x - top) / how.temperature);
    if (exponential >= 0.f && exponential <= 1.f) weight = u64(exponential * kSumScale);  // others: NaN
  }
  // A weight has 45 bits, and sums over a warp are of 32: add its lower 22 and its other bits separately.
  const u64 low = u32(warp_sum(int(weight & 0x3fffffu))), high = u32(warp_sum(int(weight >> 22)));
  u32* sums = reinterpret_cast<u32*>(sampling_shared(kCountsAt));
  if (thread() % kWarp == 0) {
    sums[2 * (thread() / kWarp)] = u32(low + (high << 22));
    sums[2 * (thread() / kWarp) + 1] = u32((low + (high << 22)) >> 32);
  }
  sync_block();
  if (thread() == 0) {
    u64 total = 0;
    for (int i = 0; i < kShortlistThreads / kWarp; ++i) total += sums[2 * i] | u64(sums[2 * i + 1]) << 32;
    reinterpret_cast<u64*>(to)[segment] = total;
  }
}

// Grid: (1 + segments, rows). The first block of a row merges, the others sum.
template <class A> EDGELM_BODY void sample_rows(const SamplingArgs& args) {
  static_assert(Same<A, float>::value, "logits are float32");
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int row = block_y();
  const SamplingRow how = args.how[row];
  if (block_x() > 0 && !(how.wants & kWantsSums)) return;
  SamplingPart part{0.f, -1, 0, 0};
  if (thread() < args.part_count) part = args.parts[i64(row) * args.part_count + thread()];
  block_best(part.top, part.best, reinterpret_cast<float*>(sampling_shared(kBestAt)));
  u8* to = args.results + i64(row) * args.stride;
  u8* lists = to + sizeof(SamplingResult);
  if (block_x() > 0) {
    sum_segment(args, how, part.top, lists + 8 * kShortlist);
    return;
  }
  const u32 highest = block_largest(part.highest, 0);
  u32 bound = block_largest(part.bound, 1);
  int count = 0;
  if (how.wants & kWantsShortlist) list_row(args, bound, count, lists);
  if (thread() == 0) {
    SamplingResult& result = *reinterpret_cast<SamplingResult*>(to);
    result.highest = highest == kNanKey ? bits_to_float(0x7fc00000u) : value_of(highest);
    result.top = part.top;
    result.best = part.best;
    result.bound = value_of(bound > kLowestKey ? bound : kLowestKey);
    result.count = count;
  }
}

}  // namespace edgelm
