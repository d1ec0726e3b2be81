// Zeros in a device's memory, for counters that kernels leave as zeros. They save launches.
#pragma once

#include <vector>

#include "cuda/host/launch.h"

namespace edgelm::trt {

// The counters of one plugin in one execution context, which runs on one stream at a time.
class Counters {
 public:
  Counters() = default;
  ~Counters();
  Counters(const Counters&) = delete;
  Counters& operator=(const Counters&) = delete;

  // Return the address of `bytes` zeros; 0: none can be had now, because the stream is captured and no earlier call
  // has allocated them. Throws Error if memory is full.
  u64 at_least(u64 bytes, void* stream);

 private:
  // Smaller ones are kept: a CUDA graph may have captured them.
  std::vector<u64> addresses_;
  u64 bytes_ = 0;  // of the last
};

}  // namespace edgelm::trt
