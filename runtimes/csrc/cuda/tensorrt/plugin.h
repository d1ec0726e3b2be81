// All our operators as TensorRT plugins: one class, whose `PluginSpec` describes the node.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cuda/host/node.h"
#include "cuda/tensorrt/abi.h"
#include "cuda/driver/counters.h"
#include "cuda/driver/driver.h"
#include "cuda/tensorrt/plugin_spec.h"

namespace edgelm::trt {

// TensorRT's parser reserves names such as GroupQueryAttention in any namespace: ours have a prefix.
extern const char* const kPrefix;
extern const char* const kNamespace;
extern const char* const kVersion;
extern const char* const kField;
extern const char* const kLibrary;  // the hash of this library's sources

// A plugin of a graph that is built, or of an engine. TensorRT clones it for each execution context (`attach`).
class NodePlugin final : public Plugin, public Core, public BuildV2, public Runtime {
 public:
  explicit NodePlugin(std::shared_ptr<const gpu::PluginSpec> spec);

  Versioned* capability(Capability kind) noexcept override;
  Plugin* clone() noexcept override;

  const char* name() const noexcept override { return name_.c_str(); }
  const char* version() const noexcept override { return kVersion; }
  const char* name_space() const noexcept override { return kNamespace; }

  int32_t configure(const DynamicTensorDesc*, int32_t, const DynamicTensorDesc*, int32_t) noexcept override {
    return 0;
  }
  int32_t output_types(DataType* outputs, int32_t output_count, const DataType* inputs,
                       int32_t input_count) const noexcept override;
  int32_t output_shapes(const DimsExpressions* inputs, int32_t input_count, const DimsExpressions* shapes,
                        int32_t shape_count, DimsExpressions* outputs, int32_t output_count,
                        ExpressionBuilder& builder) noexcept override;
  bool supports(int32_t position, const DynamicTensorDesc* tensors, int32_t input_count,
                int32_t output_count) noexcept override;
  int32_t output_count() const noexcept override { return spec_->output_count(); }
  std::size_t workspace(const DynamicTensorDesc* inputs, int32_t input_count, const DynamicTensorDesc* outputs,
                        int32_t output_count) const noexcept override;
  int32_t aliased_input(int32_t output) noexcept override { return spec_->aliased_input(output); }

  int32_t on_shape_change(const TensorDesc*, int32_t, const TensorDesc*, int32_t) noexcept override { return 0; }
  int32_t enqueue(const TensorDesc* input_descs, const TensorDesc* output_descs, const void* const* inputs,
                  void* const* outputs, void* workspace, Stream stream) noexcept override;
  Plugin* attach(ResourceContext*) noexcept override { return clone(); }
  const Fields* fields_to_serialize() noexcept override;

 private:
  // Set the type and dimensions of one of the plugin's inputs.
  void describe(gpu::Node& node, std::size_t input, DataType type, const Dims& dims) const;

  std::shared_ptr<const gpu::PluginSpec> spec_;
  std::string name_, text_;
  Field field_;
  Fields fields_;
  gpu::Node node_;
  Counters counters_;
  // The launches of the last call, and the shapes and addresses that they are for: in decoding they rarely change.
  std::vector<u64> planned_for_;
  gpu::Launches launches_;
  std::vector<LoadedKernel> kernels_;
};

class NodeCreator final : public Creator {
 public:
  explicit NodeCreator(const std::string& op);

  Plugin* create(const char* name, const Fields* fields, Phase phase) noexcept override;
  const Fields* field_names() noexcept override { return &fields_; }
  const char* name() const noexcept override { return name_.c_str(); }
  const char* version() const noexcept override { return kVersion; }
  const char* name_space() const noexcept override { return kNamespace; }

 private:
  std::string name_;
  Field field_;
  Fields fields_;
};

}  // namespace edgelm::trt
