// Run the golden prompts on the device and keep what is compared with the pack. As edgelm/parity/device_run.py.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "capi/parity/logits.h"
#include "capi/parity/parity.h"

namespace edgelm::capi {

// Results of the device's debug graph at the pack's N positions.
struct DeviceTrace {
  std::vector<float> sketches;        // [L + 1, N, 64]
  std::vector<float> router;          // [L, N, E]; empty for a dense model
  std::vector<std::int32_t> experts;  // [L, N, k]
  std::int64_t chosen = 0;            // k
};

// All results of the device. `decoded` covers the positions that choose greedy tokens.
struct DeviceRun {
  explicit DeviceRun(const ParityPack& pack) : at_once(pack), decoded(pack), debug(pack) {}

  LogitRecord at_once, decoded, debug;
  std::optional<DeviceTrace> trace;
  std::string runtime, kv, engine, isa;       // the last two are empty where there is none
  std::optional<std::int64_t> resident_peak;  // bytes, of the process, before the debug graph was loaded
  int threads = 0;
  double load_seconds = kNan;
  std::int64_t prefill_tokens = 0, decode_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;
  std::vector<std::string> notes;
};

// Reports progress of one task to the caller, who may cancel.
class Task {
 public:
  Task(const ParityOptions& options, const char* what, std::int64_t total);
  // Throws Error(EDGELM_CANCELLED) if the caller cancels.
  void advance(std::int64_t amount);

 private:
  void report() const;

  const ParityOptions& options_;
  const char* what_;
  std::int64_t done_ = 0, total_;
};

// The indices of the k largest router logits of `count` rows [E], largest first; of equals the lower index first.
std::vector<std::int32_t> choose(const float* router, std::int64_t count, std::int64_t experts, std::int64_t k);

// Run both graphs over the pack's prompts, one graph after the other so that only one is in memory.
DeviceRun run_device(const Bundle& bundle, const ParityPack& pack, const ParityOptions& options);

}  // namespace edgelm::capi
