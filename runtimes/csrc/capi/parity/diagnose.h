// Find the first layer in which a device differs from the reference, and the part of it that is wrong. As
// edgelm/parity/diagnose.py, which explains the method.
#pragma once

#include "capi/parity/device/device_run.h"

namespace edgelm::capi {

// Compare a device's trace with the pack, layer by layer.
Diagnosis diagnose(const ParityPack& pack, const DeviceTrace& trace, const Limits& limits);

// The checks of the debug graph: embedding, layers, experts, logits.
std::vector<Check> layer_checks(const ParityPack& pack, const LogitRecord& debug, const Diagnosis& diagnosis,
                                const Limits& limits);

// The few experts that explain the bad positions and not the good ones, of `chosen` [N, k]; none if there is no such set.
std::optional<std::vector<std::int32_t>> guilty_experts(const std::int32_t* chosen, std::int64_t k, const Mask& bad,
                                                        const Mask& good);

}  // namespace edgelm::capi
