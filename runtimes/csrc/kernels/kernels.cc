// One instruction set's table. Compiled once for each with EDGELM_SIMD (the header of its vectors), EDGELM_TABLE and
// EDGELM_NAME set by the build. No header with inline functions of external linkage may be included here: the linker
// would keep one copy of those, compiled for whichever instruction set.
#include <cmath>

#include EDGELM_SIMD
#include "kernels/attention/attention_impl.h"
#include "kernels/linear/linear_impl.h"

namespace edgelm {

extern const Kernels EDGELM_TABLE;
const Kernels EDGELM_TABLE = {
    EDGELM_NAME,
    {QuantizeRows, RmsNorm, LinearInt8, LinearUpper, LinearFloat, Softmax},
    {AttentionPrepare, AttentionAttend, AttentionCombine},
};

}  // namespace edgelm
