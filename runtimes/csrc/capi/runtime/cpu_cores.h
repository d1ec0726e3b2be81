// CPU cores that this process may use, as edgelm/devices.py counts them.
#pragma once

#include <string>
#include <vector>

namespace edgelm::capi {

// Physical cores that CPU affinity and the container's quota leave to this process; at least 1.
int allowed_cores();

// All of the machine's cores: hardware threads, and physical cores (0 if the system does not say).
int machine_logical_cores();
int machine_physical_cores();

// The folders of this process's control groups and of their parents; none except on Linux.
std::vector<std::string> own_cgroups();

// Why `threads` threads are too many; empty if they are not.
std::string thread_problem(int threads);

}  // namespace edgelm::capi
