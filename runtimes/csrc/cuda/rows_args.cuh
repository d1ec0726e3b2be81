// Arguments of the kernels over rows: norms, conversions, embedding, argmax.
#pragma once

#include "types.cuh"

namespace edgelm {

struct RowsArgs {
  const void* x;      // [rows, k]: float32 if x_float, otherwise A
  const float* norm;  // [k]; null: no norm
  void* y;            // [rows, k]: float32, A or E4M3
  float* scales;      // [rows]; null unless rounded to E4M3
  i32 rows;
  i32 k;  // even
  i32 x_float;
  float epsilon;
  float round_scale;  // as in LinearArgs
};

struct RmsNormArgs {
  const void* x;          // A [rows, k]
  const float* weight;    // [k]
  const float* residual;  // [rows, k]; null: none
  float* y;               // [rows, k]; may be x or residual
  i32 k;                  // even
  float epsilon;
};

struct EmbeddingArgs {
  const i32* ids;   // [rows]
  const u8* codes;  // the table [n, k], packed as a weight matrix; a tied head reads the same one
  const u8* scales;
  const u8* zeros;
  float* y;  // [rows, k]
  i32 rows;
  i32 n;  // ids outside 0 .. n - 1 read row 0
  i32 k;
  i32 group;
};

struct LastTokenArgs {
  const float* x;  // [batch, tokens, k]
  float* y;        // [batch, k]
  i32 tokens;
  i32 k;
};

struct TopArgs {
  const float* x;  // [rows, n] input of the first kernel
  float* values;   // [rows, parts] passed from the first kernel to the second
  i32* ids;        // likewise
  i32* out_ids;    // [rows]
  i32 n;
  i32 parts;
  i32 part;  // columns of a part
};

}  // namespace edgelm
