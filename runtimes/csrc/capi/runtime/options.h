// Options of runtimes, checked and with their defaults filled in.
#pragma once

#include "capi/runtime/runtime.h"

namespace edgelm::capi {

constexpr std::int64_t kDefaultContextLength = 4096;
constexpr std::int64_t kDefaultChunk = 512;

// Throws Error(EDGELM_INVALID_ARGUMENT) if a number is out of range. 0 is the default of each.
void check_options(const RuntimeOptions& options);

// Set the runtime's sizes by a bundle and checked options. `chunk` is the default of the runtime. Throws
// Error(EDGELM_INVALID_ARGUMENT) if the context length is beyond the model's.
void set_sizes(Runtime& runtime, const Bundle& bundle, const RuntimeOptions& options,
               std::int64_t chunk = kDefaultChunk);

// The CPU threads that checked options ask for.
int chosen_threads(const RuntimeOptions& options);

}  // namespace edgelm::capi
