#include "cuda/host/kernels.h"

#include "cuda/host/planners.h"

namespace edgelm::gpu {

std::string KernelSource::instantiation() const {
  return "EDGELM_KERNEL(" + name + ", " + args + ", " + std::to_string(threads) + ", " + std::to_string(min_blocks) +
         ", " + body + ")";
}

const char* cuda_type(const std::string& type) {
  static const std::map<std::string, const char*> kTypes = {{"int4", "Int4"}, {"int8", "Int8"}, {"fp8", "e4m3"},
                                                            {"f16", "f16"},   {"bf16", "bf16"}, {"f32", "float"}};
  return kTypes.at(type);
}

std::string lines_of(const KernelNames& names) {
  std::string lines;
  for (const std::string& name : names) lines += name + "\n";
  return lines;
}

// Every kernel: its header, its name and the line that instantiates it, separated by tabs.
Functions kernel_functions() {
  return {{"kernels", [](const Fields&) {
             std::string lines;
             for (const KernelSources* kernels :
                  {&linear_kernels(), &moe_kernels(), &attention_kernels(), &sampling_kernels()}) {
               for (const KernelSource& one : *kernels) {
                 lines += one.header + "\t" + one.name + "\t" + one.instantiation() + "\n";
               }
             }
             return lines;
           }}};
}

}  // namespace edgelm::gpu
