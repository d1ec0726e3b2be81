#include "cuda/driver/counters.h"

#include <exception>

#include "cuda/driver/driver.h"

namespace edgelm::trt {

u64 Counters::at_least(u64 bytes, void* stream) {
  if (!bytes) return 0;
  if (bytes <= bytes_) return addresses_.back();
  const Driver& driver = Driver::get();
  int capturing = 0;
  driver.call("cuStreamIsCapturing", "asking whether a stream is captured", stream, &capturing);
  if (capturing) return 0;
  const u64 wanted = gpu::round_up(bytes, 4096);
  u64 address = 0;
  driver.call("cuMemAlloc_v2", "allocating counters", &address, std::size_t(wanted));
  addresses_.push_back(address);
  driver.call("cuMemsetD8Async", "clearing counters", address, static_cast<unsigned char>(0), std::size_t(wanted),
              stream);
  bytes_ = wanted;
  return address;
}

Counters::~Counters() {
  for (const u64 address : addresses_) {
    try {
      Driver::get().call("cuMemFree_v2", "freeing counters", address);
    } catch (const std::exception&) {  // the process ends or its context is gone, and the memory with it
    }
  }
}

}  // namespace edgelm::trt
