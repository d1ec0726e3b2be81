// CPU cores that this process may use, as edgelm/devices.py counts them.
#pragma once

#include <string>

namespace edgelm::capi {

// Physical cores that CPU affinity and the container's quota leave to this process; at least 1.
int allowed_cores();

// Why `threads` threads are too many; empty if they are not.
std::string thread_problem(int threads);

}  // namespace edgelm::capi
