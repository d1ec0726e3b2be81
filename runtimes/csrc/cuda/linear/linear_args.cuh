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
  i32 split;          // skinny: warps that share the columns of 16 rows
  i32 chunk;          // skinny: columns of x in shared memory at a time, a multiple of 64 or all
  i32 x_tile;         // skinny: rows of it, 1 to the kernel's 8, 16 or 32
};

}  // namespace edgelm
