#include "cuda/tensorrt/plugin.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "cuda/driver/driver.h"
#include "cuda/tensorrt/log.h"

namespace edgelm::trt {

using gpu::Error;

const char* const kPrefix = "EdgeLM";
const char* const kNamespace = "edgelm";
const char* const kVersion = "1";
const char* const kField = "spec";
const char* const kLibrary = EDGELM_PLUGINS_SOURCES;

namespace {

constexpr std::pair<DataType, const char*> kTypes[] = {{DataType::kFloat, "f32"},   {DataType::kHalf, "f16"},
                                                       {DataType::kBf16, "bf16"},   {DataType::kInt8, "int8"},
                                                       {DataType::kInt32, "int32"}, {DataType::kUint8, "uint8"}};

std::string type_name(DataType type) {
  for (const auto& [theirs, ours] : kTypes) {
    if (theirs == type) return ours;
  }
  throw Error("a plugin has a tensor of TensorRT's type " + std::to_string(int32_t(type)) + ": report this bug");
}

DataType type_of(const std::string& name) {
  for (const auto& [theirs, ours] : kTypes) {
    if (name == ours) return theirs;
  }
  throw Error("TensorRT has no type " + name + ": report this bug");
}

// Scratch memory is sized before the device is known. It grows with the number of multiprocessors only, and no GPU has
// so many.
constexpr gpu::DeviceInfo kLargestDevice{90, 256};

// Call a function for TensorRT, which expects 0 for success. It reports no reason for a failure: the log does.
template <class Call> int32_t status_of(const Call& call) noexcept {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    report(error);
    return 1;
  }
}

}  // namespace

NodePlugin::NodePlugin(std::shared_ptr<const gpu::PluginSpec> spec)
    : spec_(std::move(spec)),
      name_(std::string(kPrefix) + spec_->op().name),
      text_(spec_->serialised(kLibrary)),
      field_{kField, text_.data(), FieldType::kChar, int32_t(text_.size())},
      fields_{1, &field_} {
  node_.op = spec_->op().name;
  node_.name = spec_->name();
  node_.attributes = spec_->fields();
  node_.inputs.resize(std::size_t(spec_->inputs().back()) + 1);
  node_.outputs.resize(std::size_t(spec_->output_count()));
}

Versioned* NodePlugin::capability(Capability kind) noexcept {
  switch (kind) {
    case Capability::kBuild: return static_cast<BuildV2*>(this);
    case Capability::kRuntime: return static_cast<Runtime*>(this);
    case Capability::kCore: return static_cast<Core*>(this);
  }
  return nullptr;
}

Plugin* NodePlugin::clone() noexcept {
  Plugin* made = nullptr;
  status_of([&] { made = new NodePlugin(spec_); });
  return made;
}

int32_t NodePlugin::output_types(DataType* outputs, int32_t output_count, const DataType* inputs,
                                 int32_t input_count) const noexcept {
  return status_of([&] {
    std::vector<std::string> given;
    for (int32_t i = 0; i < input_count; ++i) given.push_back(type_name(inputs[i]));
    const std::vector<std::string> types = spec_->output_types(given);
    for (int32_t i = 0; i < output_count; ++i) outputs[i] = type_of(types.at(std::size_t(i)));
  });
}

int32_t NodePlugin::output_shapes(const DimsExpressions* inputs, int32_t input_count, const DimsExpressions*, int32_t,
                                  DimsExpressions* outputs, int32_t output_count, ExpressionBuilder& builder) noexcept {
  return status_of([&] {
    const auto& results = spec_->results();
    for (int32_t i = 0; i < output_count; ++i) {
      const int alias = spec_->aliased_input(i);
      if (alias >= 0) {
        if (alias >= input_count) throw Error(spec_->name() + " lacks an input: report this bug");
        outputs[i] = inputs[alias];
        continue;
      }
      const auto& dims = spec_->op().outputs.at(std::size_t(i));
      outputs[i].rank = int32_t(dims.size()) + 1;
      for (std::size_t axis = 0; axis < dims.size(); ++axis) {
        const Expression* multiplied = nullptr;
        for (const gpu::InputDim& dim : dims[axis]) {
          const Expression* factor = inputs[spec_->place(dim.input)].d[dim.axis];
          multiplied = multiplied ? builder.maker->operation(DimensionOperation::kMultiply, *multiplied, *factor)
                                  : factor;
        }
        outputs[i].d[axis] = multiplied ? multiplied : builder.maker->constant(1);
      }
      outputs[i].d[dims.size()] = builder.maker->constant(results.at(std::size_t(i)).width);
    }
  });
}

bool NodePlugin::supports(int32_t position, const DynamicTensorDesc* tensors, int32_t input_count, int32_t) noexcept {
  bool supported = false;
  status_of([&] {
    const TensorDesc& tensor = tensors[position].desc;
    if (tensor.format != Format::kLinear) return;
    if (position < input_count) {
      supported = std::any_of(std::begin(kTypes), std::end(kTypes),
                              [&](const auto& type) { return type.first == tensor.type; });
      return;
    }
    std::vector<std::string> given;
    for (int32_t i = 0; i < input_count; ++i) given.push_back(type_name(tensors[i].desc.type));
    supported = type_of(spec_->output_types(given).at(std::size_t(position - input_count))) == tensor.type;
  });
  return supported;
}

void NodePlugin::describe(gpu::Node& node, std::size_t input, DataType type, const Dims& dims) const {
  gpu::Tensor& tensor = node.inputs.at(std::size_t(spec_->inputs().at(input)));
  tensor.type = type_name(type);
  tensor.dims.assign(dims.d, dims.d + dims.rank);
}

std::size_t NodePlugin::workspace(const DynamicTensorDesc* inputs, int32_t input_count, const DynamicTensorDesc*,
                                  int32_t) const noexcept {
  std::size_t bytes = 0;
  const int32_t failed = status_of([&] {
    gpu::Node node = node_;
    for (int32_t i = 0; i < input_count; ++i) describe(node, std::size_t(i), inputs[i].desc.type, inputs[i].max);
    const std::vector<i64>& most = node.input(0).dims;
    bytes = gpu::scratch_bytes(node, kLargestDevice, most.at(0), most.at(0) * most.at(1));
  });
  // The only way to say that it failed: no GPU has so much memory.
  return failed ? std::size_t(1) << 60 : bytes;
}

int32_t NodePlugin::enqueue(const TensorDesc* input_descs, const TensorDesc*, const void* const* inputs,
                            void* const* outputs, void* workspace, Stream stream) noexcept {
  return status_of([&] {
    const std::size_t input_count = spec_->inputs().size();
    std::vector<u64> key{reinterpret_cast<u64>(workspace)};
    for (std::size_t i = 0; i < input_count; ++i) {
      const Dims& dims = input_descs[i].dims;
      key.push_back(reinterpret_cast<u64>(inputs[i]));
      key.insert(key.end(), dims.d, dims.d + dims.rank);
    }
    for (int i = 0; i < spec_->output_count(); ++i) {
      const int alias = spec_->aliased_input(i);
      if (alias >= 0 && outputs[i] != inputs[alias]) {
        throw Error(spec_->name() +
                    ": TensorRT did not alias the cache's output with its input, so updates would be lost: use "
                    "another version of TensorRT, or the runtime cuda-kernels");
      }
      key.push_back(reinterpret_cast<u64>(outputs[i]));
    }
    DeviceContext& device = DeviceContext::current();
    key.push_back(reinterpret_cast<u64>(&device));
    if (key != planned_for_) {
      planned_for_.clear();
      for (std::size_t i = 0; i < input_count; ++i) {
        describe(node_, i, input_descs[i].type, input_descs[i].dims);
        node_.inputs[std::size_t(spec_->inputs()[i])].address = reinterpret_cast<u64>(inputs[i]);
      }
      for (std::size_t i = 0; i < node_.outputs.size(); ++i) {
        node_.outputs[i].type = "f32";  // present
        node_.outputs[i].address = reinterpret_cast<u64>(outputs[i]);
      }
      const std::vector<i64>& step = node_.input(0).dims;
      const u64 counter_bytes = gpu::counter_bytes(node_, step.at(0), step.at(0) * step.at(1));
      const u64 counters = counters_.at_least(counter_bytes, stream);
      launches_ = gpu::launches(node_, device.info(), key.front(), counters);
      kernels_ = device.load(launches_);
      if (counters || !counter_bytes) planned_for_ = std::move(key);
    }
    device.launch(launches_, kernels_, stream);
  });
}

const Fields* NodePlugin::fields_to_serialize() noexcept { return &fields_; }

NodeCreator::NodeCreator(const std::string& op)
    : name_(kPrefix + op), field_{kField, nullptr, FieldType::kChar, 0}, fields_{1, &field_} {}

Plugin* NodeCreator::create(const char* name, const Fields* fields, Phase phase) noexcept {
  Plugin* made = nullptr;
  status_of([&] {
    for (int32_t i = 0; fields && i < fields->count; ++i) {
      const Field& field = fields->fields[i];
      if (std::string(field.name) != kField || !field.data) continue;
      std::string text(static_cast<const char*>(field.data), std::size_t(field.length));
      text.resize(std::min(text.size(), text.find('\0')));
      auto spec = std::make_shared<gpu::PluginSpec>(std::move(text));
      if (kPrefix + std::string(spec->op().name) != name_) {
        throw Error(spec->name() + ": the plugin " + name_ + " has the field of a " + spec->op().name,
                    Error::Kind::kBundle);
      }
      const std::string built_by = spec->fields().text("library", phase == Phase::kBuild ? kLibrary : "none");
      if (built_by != kLibrary) {
        throw Error(spec->name() + ": the engine was built with another libedgelm_plugins.so (" + built_by +
                        ", this one is " + kLibrary + "): load the one beside the engine, or run `edgelm build`",
                    Error::Kind::kBundle);
      }
      made = new NodePlugin(std::move(spec));
      return;
    }
    throw Error(std::string(name ? name : "a node") + ": the plugin " + name_ + " has no field " + kField,
                Error::Kind::kBundle);
  });
  return made;
}

}  // namespace edgelm::trt
