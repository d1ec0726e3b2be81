// The list of all kernels. A kernel is instantiated from a header by one line of C++.
#pragma once

#include <string>
#include <vector>

#include "cuda/host/launch.h"

namespace edgelm::gpu {

struct KernelSource {
  std::string name;
  std::string header;  // its path in csrc/cuda
  std::string args;    // the struct of its arguments
  i64 threads;         // of a block
  i64 min_blocks;      // blocks for each multiprocessor that registers must suffice for
  std::string body;    // C++ of the function called with the arguments

  // The line of C++ that instantiates it.
  std::string instantiation() const;
};
using KernelSources = std::vector<KernelSource>;
using KernelNames = std::vector<std::string>;

const KernelSources& linear_kernels();
const KernelSources& moe_kernels();
const KernelSources& attention_kernels();
const KernelSources& sampling_kernels();

// The C++ name of the element type: of activations, or of weights (int4 and int8 included).
const char* cuda_type(const std::string& type);

// A name to a line, for Python.
std::string lines_of(const KernelNames& names);

}  // namespace edgelm::gpu
