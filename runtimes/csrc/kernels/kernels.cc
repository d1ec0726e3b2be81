// The kernel table of one instruction set. Compiled once for each, with EDGELM_SIMD (the header of its vectors),
// EDGELM_TABLE and EDGELM_NAME set by the build. Do not include headers with inline functions of external linkage here:
// the linker would keep one copy of those, compiled for any one of the instruction sets.
#include <cmath>

#include "kernels/flat.h"

#include EDGELM_SIMD
#include "kernels/attention/attention_impl.h"
#include "kernels/linear/linear_impl.h"

namespace edgelm {

extern const Kernels EDGELM_TABLE;
const Kernels EDGELM_TABLE = {
    EDGELM_NAME,
    {QuantizeRows, RmsNorm, LinearInt8, LinearHigh, LinearFloat, Softmax},
    {AttentionPrepare, AttentionAttend, AttentionCombine},
};

}  // namespace edgelm
