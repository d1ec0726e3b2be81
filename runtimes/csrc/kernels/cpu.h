// Detects the CPU's instruction sets and chooses the kernels that run on it.
#ifndef EDGELM_KERNELS_CPU_H_
#define EDGELM_KERNELS_CPU_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "system/export.h"

namespace edgelm {

// A compiled table and whether it can run here.
struct InstructionSet {
  const Kernels* kernels = nullptr;
  std::string missing;  // why it cannot run here; empty if it can

  bool available() const { return missing.empty(); }
};

// Every table in this library, best first; the last, scalar, is always available.
const std::vector<InstructionSet>& InstructionSets();

// Choose a table: the one that the environment variable EDGELM_ISA names, otherwise the best available. `why` receives
// the reason. If EDGELM_ISA names an unknown instruction set or one that this CPU lacks, return nullptr, and `why` is
// an error with the valid names. The variable is read at each call.
const Kernels* ChooseKernels(std::string* why);

}  // namespace edgelm

// C interface to the above for runtimes/onnxruntime/native_library.py (ctypes).
extern "C" {

// Increment this whenever these functions change. The caller checks that it gets the number that it was written for.
#define EDGELM_OPS_ABI 2
EDGELM_EXPORT int32_t edgelm_ops_abi(void);

// The number of compiled tables; a table's name, best first; what the CPU lacks for it, or null if it is available.
EDGELM_EXPORT int32_t edgelm_isa_count(void);
EDGELM_EXPORT const char* edgelm_isa_name(int32_t index);
EDGELM_EXPORT const char* edgelm_isa_missing(int32_t index);

// The index of the table in use, or -1 if EDGELM_ISA cannot be followed. The reason, or the error, is written to `why`,
// cut to `size` bytes.
EDGELM_EXPORT int32_t edgelm_isa_chosen(char* why, int64_t size);

// Whether models that this thread runs compute all logits exactly, also of a single row (attribute `refine` of
// QuantLinear). Returns what was set before; off at first.
EDGELM_EXPORT int32_t edgelm_exact_logits(int32_t on);

}  // extern "C"

#endif  // EDGELM_KERNELS_CPU_H_
