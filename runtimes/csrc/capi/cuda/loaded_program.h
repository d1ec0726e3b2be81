// A GPU bundle's program with its weights on a device. As LoadedProgram of runtimes/cuda/loading.py.
#pragma once

#include <memory>
#include <set>
#include <string>

#include "capi/bundle/bundle.h"
#include "cuda/executor/executor.h"

namespace edgelm::capi {

// The code of an error of the executor.
edgelm_code code_of(const gpu::Error& error);

// Run `work`; an error of the executor becomes an Error.
template <class Work> auto guarded(const Work& work) -> decltype(work()) {
  try {
    return work();
  } catch (const gpu::Error& error) {
    throw Error(code_of(error), error.what());
  }
}

// Memory for steps of these sizes, and what runs them.
struct Execution {
  gpu::Layout layout;
  std::unique_ptr<gpu::Executor> executor;
};

// All functions throw gpu::Error, the constructor Error(EDGELM_BUNDLE) as well. A thread makes the device current first.
class LoadedProgram {
 public:
  // Read program and kernels, and open the device.
  LoadedProgram(const Bundle& bundle, bool debug);

  gpu::Device& device() { return *device_; }
  const gpu::Program& program() const { return program_; }

  // Memory for steps that keep the values `kept`; the first time the weights are uploaded too, after a check that both
  // fit.
  std::unique_ptr<Execution> execution(const gpu::Sizes& sizes, const std::set<std::string>& kept);

 private:
  void check_vocabulary(const Bundle& bundle) const;
  void require_memory(const gpu::Layout& layout) const;

  std::string name_, weights_file_;
  gpu::Program program_;
  std::unique_ptr<gpu::Device> device_;
  std::unique_ptr<gpu::DeviceWeights> weights_;
};

}  // namespace edgelm::capi
