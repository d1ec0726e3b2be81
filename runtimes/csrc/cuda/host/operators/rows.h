// Launches of small kernels over rows: conversions, norms, embedding, argmax.
#pragma once

#include <string>

#include "cuda/host/kernels.h"
#include "cuda/host/matrix.h"

namespace edgelm::gpu {

constexpr i64 kRowThreads = 256;  // of a block of these kernels

// A kernel that norms, converts or rounds rows.
struct Conversion {
  u64 x = 0;  // [rows, columns], float32 if x_float, otherwise of type `source`
  u64 y = 0;  // [rows, columns] of type `target`
  i64 rows = 0;
  i64 columns = 0;     // an even number
  std::string source;  // bf16 or f16
  std::string target;  // `source`, or fp8 (codes, reordered within each 16)
  bool x_float = true;
  u64 norm = 0;  // float32 [columns], weight of an RMSNorm; 0: none
  float epsilon = 1e-5f;
  float rounding = 0;  // as in Matmul
  u64 scales = 0;      // float32 [rows], receives the scales of rounding; 0: not needed
};
Launch convert_launch(const Conversion& conversion);

// y = residual + x / sqrt(mean(x^2) + epsilon) * weight, over rows.
struct RmsNorm {
  u64 x = 0;       // [rows, columns] of type `source`
  u64 weight = 0;  // float32 [columns]
  u64 y = 0;       // float32 [rows, columns]; may be x or residual
  i64 rows = 0;
  i64 columns = 0;             // an even number
  std::string source = "f32";  // bf16, f16 or f32
  u64 residual = 0;            // float32 [rows, columns]; 0: none
  float epsilon = 1e-5f;
};
Launch rms_norm_launch(const RmsNorm& norm);
// The name of the kernel for x of type `source`. Throws Error if there is none.
std::string rms_norm_kernel(const std::string& source);

// y[r, :] = table[ids[r], :], float32 [rows, K]; ids are int32. Throws Error if the table is not one plain matrix.
Launch embedding_launch(u64 ids, const Matrix& matrix, u64 blob, u64 y, i64 rows);
std::string embedding_kernel(const Matrix& matrix);

// y[b, :] = x[b, tokens - 1, :], float32.
Launch last_token_launch(u64 x, u64 y, i64 batch, i64 tokens, i64 columns);

// Row-wise argmax of float32 x [rows, columns] into int32 ids [rows]. Of equal values the first is chosen; NaN never
// is; -1 if all values are NaN. `workspace`: address of `argmax_workspace_bytes`, aligned to 256.
Launches argmax_launches(u64 x, u64 ids, i64 rows, i64 columns, u64 workspace);
u64 argmax_workspace_bytes(i64 rows, i64 columns);

}  // namespace edgelm::gpu
