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

  static CudaVersion of(const std::string& text);  // such as 13.0; throws Error (kBundle)
  bool operator<(const CudaVersion& other) const { return std::tie(major, minor) < std::tie(other.major, other.minor); }
  std::string text() const { return std::to_string(major) + "." + std::to_string(minor); }
};

struct KernelTarget {
  std::string name;      // sm_86 or compute_80
  CudaVersion compiler;  // the version of NVRTC that compiled it
};

// Return the best target for a device: of its own SM, of an earlier SM of its generation, or PTX. A driver loads cubins
// of its own major version of CUDA and of older ones, and PTX of its own version and older ones
// (https://docs.nvidia.com/deploy/cuda-compatibility, "Minor Version Compatibility"). Throws Error if the device runs
// none of them, or its driver is too old for those that it runs; the message says what to do.
const KernelTarget& choose(const std::vector<KernelTarget>& targets, int sm, CudaVersion driver);

}  // namespace edgelm::gpu
