// Stands in for TensorRT in tests: it loads a library of plugins and calls their interfaces in TensorRT's order. Python
// (harness.py) calls it.
#include <dlfcn.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/tensorrt/abi.h"

using namespace edgelm::trt;

#define EXPORT extern "C" __attribute__((visibility("default")))

// The expressions of a stand-in are values.
namespace edgelm::trt {
struct Expression { int64_t value; };
}  // namespace edgelm::trt

namespace {

int g_major = 11;
std::string g_log;

struct Maker final : ExpressionMaker {
  std::vector<std::unique_ptr<Expression>> made;
  const Expression* constant(int64_t value) override {
    made.push_back(std::make_unique<Expression>(Expression{value}));
    return made.back().get();
  }
  const Expression* operation(DimensionOperation, const Expression& a, const Expression& b) override {
    return constant(a.value * b.value);
  }
};

struct Log10 final : Logger10 {
  void log(Severity, const char* message) noexcept override { g_log += std::string("10: ") + message + "\n"; }
} g_log10;
struct Finder10 final : LoggerFinder10 {
  Logger10* logger() override { return &g_log10; }
} g_finder10;
struct Log11 final : Logger11 {
  InterfaceInfo interface() const noexcept override { return {"ILogger", 1, 0}; }
  void log(Severity, const char* message) noexcept override { g_log += std::string("11: ") + message + "\n"; }
} g_log11;
struct Finder11 final : LoggerFinder11 {
  InterfaceInfo interface() const noexcept override { return {"ILoggerFinder", 1, 0}; }
  Logger11* logger() override { return &g_log11; }
} g_finder11;

BuildV2& build_of(Plugin* plugin) { return *static_cast<BuildV2*>(plugin->capability(Capability::kBuild)); }
Runtime& runtime_of(Plugin* plugin) { return *static_cast<Runtime*>(plugin->capability(Capability::kRuntime)); }

Fields* fields_of(const char* text, int32_t length) {
  static Field field;
  static Fields fields;
  field = {"spec", text, FieldType::kChar, length};
  fields = {1, &field};
  return &fields;
}

}  // namespace

// As TensorRT's library: the plugins ask for its version, which says what the logger looks like.
EXPORT int32_t getInferLibMajorVersion() { return g_major; }
EXPORT int32_t getInferLibMinorVersion() { return 0; }

EXPORT void* harness_load(const char* path, int major) {
  g_major = major;
  g_log.clear();
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return nullptr;
  const auto set = reinterpret_cast<void (*)(void*)>(dlsym(library, "setLoggerFinder"));
  set(major == 10 ? static_cast<void*>(&g_finder10) : static_cast<void*>(&g_finder11));
  return library;
}
EXPORT void harness_unload(void* library) { dlclose(library); }
EXPORT const char* harness_log() { return g_log.c_str(); }

EXPORT Creator* harness_creator(void* library, const char* name) {
  int32_t count = 0;
  const auto list = reinterpret_cast<Versioned* const* (*)(int32_t&)>(dlsym(library, "getCreators"))(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* creator = static_cast<Creator*>(list[i]);
    if (!std::strcmp(creator->name(), name)) return creator;
  }
  return nullptr;
}
EXPORT Plugin* harness_create(Creator* creator, const char* text, int32_t length, int32_t phase) {
  return creator->create("a node", fields_of(text, length), Phase(phase));
}
EXPORT Plugin* harness_clone(Plugin* plugin) { return plugin->clone(); }
EXPORT Plugin* harness_attach(Plugin* plugin) { return runtime_of(plugin).attach(nullptr); }
EXPORT void harness_delete(Plugin* plugin) { delete plugin; }
EXPORT const char* harness_serialized(Plugin* plugin, int32_t* length) {
  const Fields* fields = runtime_of(plugin).fields_to_serialize();
  *length = fields->fields[0].length;
  return static_cast<const char*>(fields->fields[0].data);
}

EXPORT int32_t harness_output_count(Plugin* plugin) { return build_of(plugin).output_count(); }
EXPORT int32_t harness_aliased(Plugin* plugin, int32_t output) { return build_of(plugin).aliased_input(output); }
// Types and dimensions of the outputs for those of the inputs; the status.
EXPORT int32_t harness_outputs(Plugin* plugin, const TensorDesc* inputs, int32_t count, TensorDesc* outputs) {
  BuildV2& build = build_of(plugin);
  const int32_t output_count = build.output_count();
  std::vector<DataType> given, types(output_count);
  std::vector<Expression> values(8 * count);
  std::vector<DimsExpressions> shapes(count), results(output_count);
  for (int32_t i = 0; i < count; ++i) {
    given.push_back(inputs[i].type);
    shapes[i].rank = inputs[i].dims.rank;
    for (int axis = 0; axis < 8; ++axis) {
      values[8 * i + axis].value = inputs[i].dims.d[axis];
      shapes[i].d[axis] = &values[8 * i + axis];
    }
  }
  Maker maker;
  struct Builder final : ExpressionBuilder {
  } builder;
  builder.maker = &maker;
  const int32_t status = build.output_types(types.data(), output_count, given.data(), count) |
                         build.output_shapes(shapes.data(), count, nullptr, 0, results.data(), output_count, builder);
  for (int32_t i = 0; i < output_count && !status; ++i) {
    outputs[i] = {{results[i].rank, {}}, types[i], Format::kLinear, 0};
    for (int axis = 0; axis < results[i].rank; ++axis) outputs[i].dims.d[axis] = results[i].d[axis]->value;
  }
  return status;
}
// Whether the plugin takes each tensor, inputs and outputs.
EXPORT bool harness_supports(Plugin* plugin, const TensorDesc* tensors, int32_t inputs, int32_t outputs, int32_t at) {
  std::vector<DynamicTensorDesc> all;
  for (int32_t i = 0; i < inputs + outputs; ++i) {
    all.push_back({tensors[i], tensors[i].dims, tensors[i].dims, tensors[i].dims});
  }
  return build_of(plugin).supports(at, all.data(), inputs, outputs);
}
EXPORT std::size_t harness_workspace(Plugin* plugin, const TensorDesc* inputs, int32_t count) {
  std::vector<DynamicTensorDesc> all;
  for (int32_t i = 0; i < count; ++i) all.push_back({inputs[i], inputs[i].dims, inputs[i].dims, inputs[i].dims});
  BuildV2& build = build_of(plugin);
  build.configure(all.data(), count, nullptr, 0);
  return build.workspace(all.data(), count, nullptr, 0);
}
EXPORT int32_t harness_enqueue(Plugin* plugin, const TensorDesc* input_descs, int32_t input_count,
                               const TensorDesc* output_descs, const void* const* inputs, void* const* outputs,
                               void* workspace, Stream stream) {
  Runtime& runtime = runtime_of(plugin);
  const int32_t output_count = build_of(plugin).output_count();
  const int32_t status = runtime.on_shape_change(input_descs, input_count, output_descs, output_count);
  return status ? status : runtime.enqueue(input_descs, output_descs, inputs, outputs, workspace, stream);
}
