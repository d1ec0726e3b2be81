#include "cuda/host/planners.h"

namespace edgelm::gpu {

Functions moe_functions() { return {}; }

}  // namespace edgelm::gpu
