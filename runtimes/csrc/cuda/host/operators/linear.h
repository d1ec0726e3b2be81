// Launches of matmuls with quantised weights, the kernels of linear.cuh. rows.h has the small kernels around them.
//
// One of three kernels computes a matmul: "skinny" for few rows, bound by reading the weights; "gemm" on tensor cores
// for many rows; "exact" in float32 throughout (activation f32). The choice depends on shapes alone, never on data.
#pragma once

#include <string>

#include "cuda/host/kernels.h"
#include "cuda/host/matrix.h"
#include "cuda/host/operators/rows.h"

namespace edgelm::gpu {

// A matmul y[slot] = residual[slot] + f(W g(x[row of slot]) + bias), with addresses on the device; 0: absent.
struct Matmul {
  Matrix matrix;                    // the weights' format. With `offsets` each matrix has its own rows
  u64 blob = 0;                     // the weights
  u64 x = 0;                        // [x_rows, K]: float32 if x_float, otherwise of type `activation`
  u64 y = 0;                        // [rows, outputs]: float32 if y_float, otherwise of type `activation`
  i64 rows = 0;                     // slots, the rows of y. 0 is allowed
  std::string activation = "bf16";  // bf16, f16, or f32 for exact matmuls; x and y are then float32
  bool x_float = false;
  bool y_float = false;
  u64 norm = 0;       // float32 [K], weight of an RMSNorm of x; x must be float32
  u64 residual = 0;   // float32 [rows, outputs], added at the end; may be y
  u64 bias = 0;       // float32 [N] of one matrix that is not SwiGLU, added to the sums before anything else
  u64 row_map = 0;    // int32 [rows], the row of x of each slot; 0: row s for slot s
  u64 offsets = 0;    // int32 [count + 1], matrix e has slots offsets[e] .. offsets[e + 1] - 1
  i64 x_rows = 0;     // rows of x, if `row_map` is given
  i64 most_rows = 0;  // upper limit of the slots per matrix; 0: `rows`. Used only to choose kernels
  float rounding =
      0;  // of x (after the norm) to E4M3: > 0: with this scale; < 0: with absmax / 448 of its row; 0: none
  float epsilon = 1e-5f;  // of the norm

  // Throw Error if the kernels cannot compute this.
  void check() const;

  i64 rows_of_x() const { return row_map ? x_rows : rows; }
  // The largest number of matrices that can have rows.
  i64 active() const;
  // Whether the skinny kernel is used.
  bool is_skinny() const;
  // Whether a separate kernel first converts x for the matmul.
  bool prepares_x() const;
};

// Every kernel that matmuls with this matrix may need, for any number of rows. Throws Error if there is none.
KernelNames matmul_kernels(const Matrix& matrix, const std::string& activation, float rounding = 0);

// Bytes of scratch memory that `matmul_launches` needs for up to this number of rows. Throws Error as `check`.
u64 matmul_workspace_bytes(const Matmul& matmul);

// The launches of a matmul. `workspace`: address of `matmul_workspace_bytes`, aligned to 256; needed if `prepares_x`.
// Throws Error as `check`, and if the workspace is missing or the shapes do not fit the device.
Launches matmul_launches(const Matmul& matmul, const DeviceInfo& device, u64 workspace);

}  // namespace edgelm::gpu
