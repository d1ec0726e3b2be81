// Holds runtimes/csrc/cuda/tensorrt/abi.h against NVIDIA's headers. Compiled by test_abi.py where they are installed.
#include <NvInfer.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "cuda/tensorrt/abi.h"

namespace ours = edgelm::trt;
namespace theirs = nvinfer1;

#define SAME_SIZE(a, b) static_assert(sizeof(ours::a) == sizeof(theirs::b), #a)
#define SAME_PLACE(a, x, b, y) static_assert(offsetof(ours::a, x) == offsetof(theirs::b, y), #a "." #x)
#define SAME_VALUE(a, b) static_assert(int(ours::a) == int(theirs::b), #a)

SAME_SIZE(InterfaceInfo, InterfaceInfo);
SAME_SIZE(Dims, Dims);
SAME_PLACE(Dims, rank, Dims, nbDims);
SAME_PLACE(Dims, d, Dims, d);
SAME_SIZE(TensorDesc, PluginTensorDesc);
SAME_PLACE(TensorDesc, dims, PluginTensorDesc, dims);
SAME_PLACE(TensorDesc, type, PluginTensorDesc, type);
SAME_PLACE(TensorDesc, format, PluginTensorDesc, format);
SAME_PLACE(TensorDesc, scale, PluginTensorDesc, scale);
SAME_SIZE(DynamicTensorDesc, DynamicPluginTensorDesc);
SAME_PLACE(DynamicTensorDesc, desc, DynamicPluginTensorDesc, desc);
SAME_PLACE(DynamicTensorDesc, min, DynamicPluginTensorDesc, min);
SAME_PLACE(DynamicTensorDesc, max, DynamicPluginTensorDesc, max);
SAME_PLACE(DynamicTensorDesc, opt, DynamicPluginTensorDesc, opt);
SAME_SIZE(Field, PluginField);
SAME_PLACE(Field, name, PluginField, name);
SAME_PLACE(Field, data, PluginField, data);
SAME_PLACE(Field, type, PluginField, type);
SAME_PLACE(Field, length, PluginField, length);
SAME_SIZE(Fields, PluginFieldCollection);
SAME_PLACE(Fields, count, PluginFieldCollection, nbFields);
SAME_PLACE(Fields, fields, PluginFieldCollection, fields);
SAME_SIZE(DimsExpressions, DimsExprs);
SAME_PLACE(DimsExpressions, rank, DimsExprs, nbDims);
SAME_PLACE(DimsExpressions, d, DimsExprs, d);
SAME_SIZE(ExpressionBuilder, IExprBuilder);

SAME_VALUE(DataType::kFloat, DataType::kFLOAT);
SAME_VALUE(DataType::kHalf, DataType::kHALF);
SAME_VALUE(DataType::kInt8, DataType::kINT8);
SAME_VALUE(DataType::kInt32, DataType::kINT32);
SAME_VALUE(DataType::kUint8, DataType::kUINT8);
SAME_VALUE(DataType::kBf16, DataType::kBF16);
SAME_VALUE(Format::kLinear, TensorFormat::kLINEAR);
SAME_VALUE(FieldType::kChar, PluginFieldType::kCHAR);
SAME_VALUE(Language::kCpp, APILanguage::kCPP);
SAME_VALUE(Capability::kCore, PluginCapabilityType::kCORE);
SAME_VALUE(Capability::kBuild, PluginCapabilityType::kBUILD);
SAME_VALUE(Capability::kRuntime, PluginCapabilityType::kRUNTIME);
SAME_VALUE(Phase::kBuild, TensorRTPhase::kBUILD);
SAME_VALUE(Phase::kRuntime, TensorRTPhase::kRUNTIME);
SAME_VALUE(DimensionOperation::kMultiply, DimensionOperation::kPROD);
SAME_VALUE(Severity::kError, ILogger::Severity::kERROR);

static int g_wrong = 0;

static void check(bool same, const char* what) {
  if (!same) std::printf("%s differs\n", what);
  g_wrong += !same;
}

// A pointer to a virtual member function is its place in the table of virtual functions.
template <class A, class B> void same_slot(A a, B b, const char* what) {
  static_assert(sizeof a == sizeof b, "pointers to member functions");
  check(!std::memcmp(&a, &b, sizeof a), what);
}
#define SAME_SLOT(a, b) same_slot(&ours::a, &theirs::b, #a)

// One of our objects as TensorRT sees it: it says that it is what NVIDIA's own class says.
template <class Theirs> void same_info(const Theirs* object) {
  const auto expected = object->Theirs::getInterfaceInfo();
  const auto info = object->getInterfaceInfo();
  check(!std::strcmp(info.kind, expected.kind) && info.major == expected.major && info.minor == expected.minor,
        expected.kind);
}

template <class Theirs> Theirs* capability(theirs::IPluginV3* plugin, theirs::PluginCapabilityType kind) {
  return static_cast<Theirs*>(plugin->getCapabilityInterface(kind));
}

// Use the library's plugins through NVIDIA's classes.
static void use(const char* library) {
  void* handle = dlopen(library, RTLD_NOW);
  if (!handle) {
    check(false, dlerror());
    return;
  }
  int32_t count = 0;
  const auto creators = reinterpret_cast<theirs::IPluginCreatorInterface* const* (*)(int32_t&)>(
      dlsym(handle, "getCreators"))(count);
  check(count == 6, "the number of creators");
  auto* creator = static_cast<theirs::IPluginCreatorV3One*>(creators[count - 1]);
  same_info(creator);
  check(!std::strcmp(creator->getPluginName(), "EdgeLMLastToken"), "the name of a creator");
  const char text[] = "edgelm_plugin=2\nop=LastToken\nname=n\npresent=1\nresults=f32:8\n\n";
  const theirs::PluginField field("spec", text, theirs::PluginFieldType::kCHAR, sizeof text);
  const theirs::PluginFieldCollection fields{1, &field};
  theirs::IPluginV3* plugin = creator->createPlugin("n", &fields, theirs::TensorRTPhase::kBUILD);
  if (!plugin) {
    check(false, "no plugin");
    return;
  }
  same_info(plugin);
  same_info(capability<theirs::IPluginV3OneCore>(plugin, theirs::PluginCapabilityType::kCORE));
  auto* build = capability<theirs::IPluginV3OneBuildV2>(plugin, theirs::PluginCapabilityType::kBUILD);
  same_info(build);
  check(build->getNbOutputs() == 1 && build->getAliasedInput(0) == -1, "the build interface");
  auto* runtime = capability<theirs::IPluginV3OneRuntime>(plugin, theirs::PluginCapabilityType::kRUNTIME);
  same_info(runtime);
  theirs::IPluginV3* attached = runtime->attachToContext(nullptr);
  delete plugin;
  runtime = capability<theirs::IPluginV3OneRuntime>(attached, theirs::PluginCapabilityType::kRUNTIME);
  const theirs::PluginFieldCollection* serialized = runtime->getFieldsToSerialize();
  check(serialized->nbFields == 1 && !std::strcmp(serialized->fields[0].name, "spec"), "the serialised field");
  delete attached;
}

int main(int, char** arguments) {
  SAME_SLOT(Versioned::language, IVersionedInterface::getAPILanguage);
  SAME_SLOT(Versioned::interface, IVersionedInterface::getInterfaceInfo);
  SAME_SLOT(Plugin::capability, IPluginV3::getCapabilityInterface);
  SAME_SLOT(Plugin::clone, IPluginV3::clone);
  SAME_SLOT(Core::name, IPluginV3OneCore::getPluginName);
  SAME_SLOT(Core::version, IPluginV3OneCore::getPluginVersion);
  SAME_SLOT(Core::name_space, IPluginV3OneCore::getPluginNamespace);
  SAME_SLOT(Build::configure, IPluginV3OneBuild::configurePlugin);
  SAME_SLOT(Build::output_types, IPluginV3OneBuild::getOutputDataTypes);
  SAME_SLOT(Build::output_shapes, IPluginV3OneBuild::getOutputShapes);
  SAME_SLOT(Build::supports, IPluginV3OneBuild::supportsFormatCombination);
  SAME_SLOT(Build::output_count, IPluginV3OneBuild::getNbOutputs);
  SAME_SLOT(Build::workspace, IPluginV3OneBuild::getWorkspaceSize);
  SAME_SLOT(Build::valid_tactics, IPluginV3OneBuild::getValidTactics);
  SAME_SLOT(Build::tactic_count, IPluginV3OneBuild::getNbTactics);
  SAME_SLOT(Build::timing_cache_id, IPluginV3OneBuild::getTimingCacheID);
  SAME_SLOT(Build::format_limit, IPluginV3OneBuild::getFormatCombinationLimit);
  SAME_SLOT(Build::metadata, IPluginV3OneBuild::getMetadataString);
  SAME_SLOT(BuildV2::aliased_input, IPluginV3OneBuildV2::getAliasedInput);
  SAME_SLOT(Runtime::set_tactic, IPluginV3OneRuntime::setTactic);
  SAME_SLOT(Runtime::on_shape_change, IPluginV3OneRuntime::onShapeChange);
  SAME_SLOT(Runtime::enqueue, IPluginV3OneRuntime::enqueue);
  SAME_SLOT(Runtime::attach, IPluginV3OneRuntime::attachToContext);
  SAME_SLOT(Runtime::fields_to_serialize, IPluginV3OneRuntime::getFieldsToSerialize);
  SAME_SLOT(Creator::create, IPluginCreatorV3One::createPlugin);
  SAME_SLOT(Creator::field_names, IPluginCreatorV3One::getFieldNames);
  SAME_SLOT(Creator::name, IPluginCreatorV3One::getPluginName);
  SAME_SLOT(Creator::version, IPluginCreatorV3One::getPluginVersion);
  SAME_SLOT(Creator::name_space, IPluginCreatorV3One::getPluginNamespace);
  SAME_SLOT(ExpressionMaker::constant, apiv::VExprBuilder::constant);
  SAME_SLOT(ExpressionMaker::operation, apiv::VExprBuilder::operation);
#if NV_TENSORRT_MAJOR >= 11 || (NV_TENSORRT_MAJOR == 1 && NV_TENSORRT_MINOR >= 7)
  SAME_SLOT(Logger11::log, ILogger::log);
  SAME_SLOT(LoggerFinder11::logger, ILoggerFinder::findLogger);
#else
  SAME_SLOT(Logger10::log, ILogger::log);
  SAME_SLOT(LoggerFinder10::logger, ILoggerFinder::findLogger);
#endif
  use(arguments[1]);
  if (!g_wrong) std::printf("as in TensorRT %d.%d\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR);
  return g_wrong;
}
