// Description of this machine for reports: CPU, cores, memory, instruction sets. As edgelm/devices.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "capi/common/json.h"

namespace edgelm::capi {

// Values that a system does not provide are null or empty; never throws for them.
Json describe_machine();

// Peak resident memory of this process in bytes; none where the system does not say.
std::optional<std::int64_t> resident_peak();

// The time in UTC, such as "2026-11-30T09:30:00+00:00".
std::string utc_now();

}  // namespace edgelm::capi
