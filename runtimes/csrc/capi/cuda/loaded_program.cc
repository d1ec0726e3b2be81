#include "capi/cuda/loaded_program.h"

#include "capi/cuda/files.h"

namespace edgelm::capi {

edgelm_code code_of(const gpu::Error& error) {
  if (dynamic_cast<const gpu::UnavailableError*>(&error) != nullptr) return EDGELM_UNAVAILABLE;
  switch (error.kind) {
    case gpu::Error::Kind::kBundle: return EDGELM_BUNDLE;
    case gpu::Error::Kind::kOther: return EDGELM_INVALID_ARGUMENT;
    default: return EDGELM_RUNTIME;
  }
}

LoadedProgram::LoadedProgram(const Bundle& bundle, bool debug)
    : name_(bundle.path()),
      weights_file_(bundle.file(bundle.manifest().weights_file)),
      program_(read_program(bundle.file("program.json"), debug)) {
  check_vocabulary(bundle);
  gpu::check_weights_file(program_, weights_file_);
  device_ = std::make_unique<gpu::Device>(read_kernel_index(bundle.file("kernels")));
}

// Ids are checked against the manifest's vocabulary, so the program must have as many.
void LoadedProgram::check_vocabulary(const Bundle& bundle) const {
  const std::int64_t size = bundle.manifest().model.vocab_size;
  bool fits = program_.values.at("logits").width == size;
  for (const gpu::ProgramNode& node : program_.nodes) {
    if (node.op == "QuantEmbedding") fits = fits && node.integer("rows") >= size;
  }
  if (fits) return;
  fail(EDGELM_BUNDLE, name_,
       ": program.json and manifest.json have vocabularies of different sizes: copy or export the "
       "bundle again");
}

std::unique_ptr<Execution> LoadedProgram::execution(const gpu::Sizes& sizes, const std::set<std::string>& kept) {
  std::unique_ptr<Execution> made(new Execution{gpu::Layout(program_, sizes, device_->info(), kept), nullptr});
  require_memory(made->layout);
  if (!weights_) {
    device_->load(made->layout.kernels());  // a missing kernel is reported before the upload, which takes long
    weights_ = std::make_unique<gpu::DeviceWeights>(*device_, program_, weights_file_);
  }
  made->executor = std::make_unique<gpu::Executor>(*device_, *weights_, made->layout);
  return made;
}

void LoadedProgram::require_memory(const gpu::Layout& layout) const {
  const std::uint64_t weights = weights_ ? 0 : program_.weight_bytes();
  const std::uint64_t needed = weights + layout.bytes();
  const auto [available, total] = device_->memory();
  if (needed <= available) return;
  throw gpu::DeviceMemoryError(concat(
      name_, " does not fit: ", device_->name(), " has ", gpu::format_size(available), " of ", gpu::format_size(total),
      " free, and ", gpu::format_size(needed), " are needed (", gpu::format_size(weights), " weights, ",
      gpu::format_size(layout.cache_bytes()), " cache, ", gpu::format_size(layout.other_bytes()),
      " values): end what else uses the GPU, take a smaller context_length or a cache of int8, or export with a "
      "smaller "
      "recipe"));
}

}  // namespace edgelm::capi
