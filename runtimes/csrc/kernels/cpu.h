// Which instruction sets this processor has, and which kernels run on it.
#ifndef EDGELM_KERNELS_CPU_H_
#define EDGELM_KERNELS_CPU_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(_WIN32)
#define EDGELM_EXPORT __declspec(dllexport)
#else
#define EDGELM_EXPORT __attribute__((visibility("default")))
#endif

namespace edgelm {

// A compiled table and whether it can run here.
struct InstructionSet {
  const Kernels* kernels = nullptr;
  std::string missing;  // what keeps it from running here; empty where it can

  bool available() const { return missing.empty(); }
};

// Every table in this library, best first; the last, scalar, is always available.
const std::vector<InstructionSet>& InstructionSets();

// The table to use: the one that the environment variable EDGELM_ISA names, else the best available. `why` is told the
// reason. Where EDGELM_ISA names one that there is not or that this processor lacks, returns nullptr, and `why` is an
// error with the valid names. The variable is read at each call.
const Kernels* ChooseKernels(std::string* why);

}  // namespace edgelm

// The same for runtimes/onnxruntime/native_library.py, through ctypes.
extern "C" {

// Raised by one whenever these functions change; the caller must see the number it was written for.
#define EDGELM_OPS_ABI 1
EDGELM_EXPORT int32_t edgelm_ops_abi(void);

// The number of compiled tables; the name of one, best first; what it lacks here, or null where it is available.
EDGELM_EXPORT int32_t edgelm_isa_count(void);
EDGELM_EXPORT const char* edgelm_isa_name(int32_t index);
EDGELM_EXPORT const char* edgelm_isa_missing(int32_t index);

// The index of the table in use, or -1 if EDGELM_ISA cannot be followed. The reason, or the error, is written to `why`,
// which has room for `size` bytes; what does not fit is cut off.
EDGELM_EXPORT int32_t edgelm_isa_chosen(char* why, int64_t size);

}  // extern "C"

#endif  // EDGELM_KERNELS_CPU_H_
