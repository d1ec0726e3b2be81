// Description of this machine for reports: CPU, cores, memory, instruction sets. As edgelm/devices.py.
#pragma once

#include "capi/common/json.h"

namespace edgelm::capi {

// Values that a system does not provide are null or empty; never throws for them.
Json describe_machine();

}  // namespace edgelm::capi
