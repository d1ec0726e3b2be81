// Products with packed matrices and what goes with them, over the vectors of simd_*.h. Included after one of those.
#ifndef EDGELM_KERNELS_LINEAR_IMPL_H_
#define EDGELM_KERNELS_LINEAR_IMPL_H_

#include "linear_float_impl.h"
#include "linear_int8_impl.h"
#include "kernels/rows_impl.h"

#endif  // EDGELM_KERNELS_LINEAR_IMPL_H_
