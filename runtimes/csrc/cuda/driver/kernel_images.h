// Compiled kernels and the choice of those that a device runs.
#pragma once

#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/host/launch.h"

namespace edgelm::gpu {

// A version of CUDA: of a compiler, or the one that a driver supports.
struct CudaVersion {
  int major, minor;
  bool operator<(const CudaVersion& other) const { return std::tie(major, minor) < std::tie(other.major, other.minor); }
  std::string text() const { return std::to_string(major) + "." + std::to_string(minor); }
};

struct KernelTarget {
  std::string name;      // sm_86 or compute_80
  CudaVersion compiler;  // the version of NVRTC that compiled it
};

// Return the best target for a device: its own SM, an earlier SM of its generation, or PTX. Throws Error if the device
// runs none of them; the message says what to do.
const KernelTarget& choose(const std::vector<KernelTarget>& targets, int sm, CudaVersion driver);

}  // namespace edgelm::gpu
