// All matmul kernels with packed matrices. Included after one of simd_*.h.
#ifndef EDGELM_KERNELS_LINEAR_IMPL_H_
#define EDGELM_KERNELS_LINEAR_IMPL_H_

#include "linear_float_impl.h"
#include "linear_int8_impl.h"
#include "kernels/rows_impl.h"

#endif  // EDGELM_KERNELS_LINEAR_IMPL_H_
