// Arguments of the matmul kernels.
#pragma once

#include "types.cuh"

namespace edgelm {

// y[slot, :] = residual[slot, :] + f(matrix of the slot's expert * g(x[row of the slot, :]) + bias)
// g: nothing, an RMSNorm, rounding to FP8; f: nothing or SwiGLU.
//
// A slot is a row of the result. Without `row_map`, slot s reads row s of x. With `experts` > 0, matrix e has the slots
// offsets[e] .. offsets[e + 1] - 1; otherwise there is one matrix, which has all `rows` slots.
struct LinearArgs {
  const void* x;          // [*, k]: float32 if x_float, otherwise A, or E4M3 as convert_rows writes it
  const u8* codes;        // the matrices in tiles
  const u8* scales;       // [experts][n / 16][groups][16]
  const u8* zeros;        // zero points in the same layout; null: symmetric
  const float* norm;      // [k]: RMSNorm weight, applied to x, which is then float32; null: no norm
  const float* residual;  // [rows, outputs]; null: none
  const float* x_scales;  // [*]: a factor for each row of x; null: none
  void* y;                // [rows, outputs]: float32 where y_float, else A
  const i32* row_map;     // [rows]; the row of x of each slot; null: row s
  union {
    const i32* offsets;  // with experts: [experts + 1]
    const float* bias;   // for one matrix without SwiGLU: [n]; null: none
  };
  i64 codes_stride;  // bytes from one expert's codes to the next's
  i64 scales_stride;
  i64 zeros_stride;
  i32 rows;   // slots
  i32 n;      // rows of a matrix; with swiglu those of gate and up together
  i32 k;      // columns
  i32 group;  // columns to a scale
  i32 experts;
  i32 swiglu;  // 1: of each 16 rows, 0 .. 7 are the gate of 8 .. 15
  i32 x_float;
  i32 y_float;
  float epsilon;      // of the norm
  float round_scale;  // rounding of x to E4M3: > 0: with this scale; < 0: with absmax / 448 of its row; 0: none
};

// x * skinny_factor(y) >> 31 is x / y rounded down, where x y is below 2^31.
EDGELM_CONSTEXPR u32 skinny_factor(u32 y) { return ((u32(1) << 31) + y - 1) / y; }

// How linear_skinny divides its work: all that is the same for every thread of a launch, computed once on the host.
//
// An item is `at_a_time` blocks of 16 rows of a matrix, times up to `x_tile` rows of x. The columns of an item are read
// in `chunks`. Of each chunk, `split` warps read the tiles of the same 16 rows, `share` tiles each.
struct SkinnyPlan {
  i32 split_shift;    // split is 2^split_shift
  i32 at_a_time;      // blocks of 16 rows that a block of threads computes at a time
  i32 blocks;         // of 16 rows of a matrix
  i32 strips;         // items of a matrix and up to x_tile rows: blocks / at_a_time, rounded up
  i32 items_each;     // without experts: items of every block of threads
  i32 items_left;     // without experts: blocks of threads, the first ones, that have one more
  u32 grid_factor;    // with experts: see skinny_factor, for the number of blocks of threads
  u32 strips_factor;  // likewise for strips
  i32 x_tile;         // rows of x in shared memory, 1 to the kernel's 8, 16 or 32
  i32 chunk_columns;  // columns of x in shared memory: all, or a multiple of 64
  i32 chunks;         // in a row
  i32 chunk;          // tiles in a chunk
  i32 share;          // tiles of a warp in a chunk, at most
  i32 last_share;     // tiles of a warp in the last chunk, at most
  i32 tiles;          // of 16 rows
  i32 block_bytes;    // of the codes of 16 rows
  i32 groups;         // of a row; 0 without scales
  u32 group_factor;   // see skinny_factor, for the steps of 16 columns in a group
  i32 ahead;          // slots of a warp's ring: 4, 2 or 1
  i32 ring;           // bytes of a warp's ring
  i32 pitch;          // bytes from one row of x in shared memory to the next
  i32 x_at;           // where the parts of shared memory behind the rings begin: x,
  i32 sums_at;        // sums,
  i32 rows_at;        // factors of rows,
  i32 experts_at;     // the list of experts
};

// What a warp of linear_skinny copies at a time, to a slot of its ring in shared memory: two tiles of 16 rows, then the
// scales and then the zero points of their groups.
struct SkinnySlot {
  i32 groups;  // the most that a tile has a part of
  i32 zeros_at, bytes;
};

// columns: of a tile. scale_bytes: of a scale; 0: none. group: columns to a scale, a multiple of 16; 0: any.
EDGELM_CONSTEXPR SkinnySlot skinny_slot(i32 columns, i32 scale_bytes, bool may_have_zeros, i32 group) {
  const i32 groups = group == 0 ? columns / 16 : group < columns ? columns / group : 1;
  const i32 zeros_at = 2 * (512 + groups * 16 * scale_bytes);
  return {groups, zeros_at, zeros_at + (may_have_zeros ? 2 * groups * 16 : 0)};
}

struct SkinnyArgs {
  LinearArgs linear;
  SkinnyPlan plan;
};

}  // namespace edgelm
