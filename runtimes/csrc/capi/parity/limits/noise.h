// Limits of the shipped graph, derived from the pack's simulated rounding. As edgelm/parity/noise.py, which explains them.
#pragma once

#include "capi/parity/limits/limits.h"
#include "capi/parity/pack/pack.h"

namespace edgelm::capi {

// `limits` with those of the shipped graph replaced, for a pack that has a rounded record.
Limits rounding_limits(const ParityPack& pack, const Limits& limits);

}  // namespace edgelm::capi
