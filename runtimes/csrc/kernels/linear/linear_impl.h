// All matmul kernels with packed matrices. Included after one of simd_*.h.
#ifndef EDGELM_KERNELS_LINEAR_IMPL_H_
#define EDGELM_KERNELS_LINEAR_IMPL_H_

#include "linear_int8_impl.h"
#include "kernels/rows_impl.h"
#if defined(EDGELM_FLOATS_OF)
#include "linear_float_shared_impl.h"
#else
#include "linear_float_impl.h"
#endif

#endif  // EDGELM_KERNELS_LINEAR_IMPL_H_
