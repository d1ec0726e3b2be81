// The C interface of cpu.h. libedgelm leaves this file out: it exports edgelm.h only.
#include <cstdio>

#include "cpu.h"

int32_t edgelm_ops_abi(void) { return EDGELM_OPS_ABI; }

int32_t edgelm_isa_count(void) { return static_cast<int32_t>(edgelm::InstructionSets().size()); }

const char* edgelm_isa_name(int32_t index) {
  return index < 0 || index >= edgelm_isa_count() ? nullptr
                                                  : edgelm::InstructionSets()[static_cast<size_t>(index)].kernels->name;
}

const char* edgelm_isa_missing(int32_t index) {
  if (index < 0 || index >= edgelm_isa_count()) return "there is no such instruction set";
  const edgelm::InstructionSet& set = edgelm::InstructionSets()[static_cast<size_t>(index)];
  return set.available() ? nullptr : set.missing.c_str();
}

int32_t edgelm_isa_chosen(char* why, int64_t size) {
  std::string reason;
  const edgelm::Kernels* chosen = edgelm::ChooseKernels(&reason);
  std::snprintf(why, static_cast<size_t>(size), "%s", reason.c_str());
  int32_t index = 0;
  for (const edgelm::InstructionSet& set : edgelm::InstructionSets()) {
    if (set.kernels == chosen) return index;
    ++index;
  }
  return -1;
}
