// Arguments and results of the sampling kernels.
#pragma once

#include "types.cuh"

namespace edgelm {

constexpr int kSamplingThreads = 256;    // of a block that reads logits; each thread has kSamplingKeys of them
constexpr int kShortlistThreads = 1024;  // of a block that merges; likewise
constexpr int kSamplingKeys = 16;
constexpr int kShortlist = 1024;             // the most tokens that are listed
constexpr int kSegment = kShortlistThreads;  // tokens whose exponentials are added to one sum
constexpr float kSumScale = 0x1p44f;         // sums are integers, multiplied by this
constexpr int kSamplingShared = 1024;        // bytes of shared memory

constexpr i32 kWantsShortlist = 1, kWantsSums = 2;

// What the host wants to know of a row's logits. The host writes one per row before each step.
struct SamplingRow {
  float temperature;  // > 0
  float penalty;      // repetition penalty, > 0; 1: none
  i32 seen;           // a token that is penalised from now on; -1: no further one
  i32 wants;          // bits kWantsShortlist, kWantsSums
};

// The result of a row. Behind it are logits [kShortlist] float, ids [kShortlist] i32, and sums [segments] u64. Logits are
// those after the penalty, except for `highest`.
struct SamplingResult {
  float highest;  // the highest logit; NaN if any is
  float top;      // the highest logit after the penalty
  i32 best;       // its token; of equal ones the first
  float bound;    // every token with a higher logit is listed
  i32 count;      // tokens that are listed, in no particular order
  i32 unused[3];
};

// What a block has found in its part of a row.
struct SamplingPart {
  float top;
  i32 best;
  u32 highest;  // a key, or all ones for NaN; see key_of
  u32 bound;    // every token of the part with a larger key is in its slots
};

struct SamplingArgs {
  const float* logits;     // [rows, n]
  const SamplingRow* how;  // [rows]
  u32* seen;               // [rows, words], bits of the penalised tokens
  SamplingPart* parts;     // workspace [rows, part_count]
  u32* keys;               // workspace [rows, part_count, slots], 0: no token
  i32* ids;                // workspace, likewise
  u8* results;             // [rows], each of `stride` bytes
  i64 stride;
  i32 n;
  i32 part_count;
  i32 slots;
  i32 words;
};

}  // namespace edgelm
