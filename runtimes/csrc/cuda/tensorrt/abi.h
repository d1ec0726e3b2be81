// The part of TensorRT's plugin interface that the library uses, declared anew: the order of virtual functions and the
// layouts of structs are facts of the interface, so that a build needs none of NVIDIA's headers.
//
// The plugin interfaces are those of TensorRT 10.0 and all later versions, BuildV2 of 10.3 and later. tests/engines/
// abi_test.cc holds all of it against NVIDIA's headers where they are installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelm::trt {

using std::int32_t;
using std::int64_t;
using Stream = void*;  // cudaStream_t

enum class DataType : int32_t { kFloat = 0, kHalf = 1, kInt8 = 2, kInt32 = 3, kBool = 4, kUint8 = 5, kBf16 = 7 };
enum class Format : int32_t { kLinear = 0 };
enum class FieldType : int32_t { kChar = 6 };
enum class Language : int32_t { kCpp = 0 };
enum class Capability : int32_t { kCore = 0, kBuild = 1, kRuntime = 2 };
enum class Phase : int32_t { kBuild = 0, kRuntime = 1 };
enum class DimensionOperation : int32_t { kMultiply = 1 };
enum class Severity : int32_t { kError = 1 };

struct InterfaceInfo {
  const char* kind;
  int32_t major, minor;
};
struct Dims {
  int32_t rank;
  int64_t d[8];
};
struct TensorDesc {
  Dims dims;
  DataType type;
  Format format;
  float scale;
};
struct DynamicTensorDesc {
  TensorDesc desc;
  Dims min, max, opt;
};
struct Field {
  const char* name;
  const void* data;
  FieldType type;
  int32_t length;
};
struct Fields {
  int32_t count;
  const Field* fields;
};

// Dimensions that depend on those of inputs, as expressions that TensorRT owns.
struct Expression;
struct DimsExpressions {
  int32_t rank;
  const Expression* d[8];
};
class ExpressionMaker {
 public:
  virtual ~ExpressionMaker() = default;
  virtual const Expression* constant(int64_t value) = 0;
  virtual const Expression* operation(DimensionOperation operation, const Expression& a, const Expression& b) = 0;
};
class ExpressionBuilder {
 public:
  virtual ~ExpressionBuilder() = default;
  ExpressionMaker* maker;
};

class Versioned {
 public:
  virtual Language language() const noexcept { return Language::kCpp; }
  virtual InterfaceInfo interface() const noexcept = 0;
  virtual ~Versioned() noexcept = default;
};

class Plugin : public Versioned {
 public:
  InterfaceInfo interface() const noexcept override { return {"PLUGIN", 1, 0}; }
  virtual Versioned* capability(Capability kind) noexcept = 0;
  virtual Plugin* clone() noexcept = 0;
};

class Core : public Versioned {
 public:
  InterfaceInfo interface() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
  virtual const char* name() const noexcept = 0;
  virtual const char* version() const noexcept = 0;
  virtual const char* name_space() const noexcept = 0;
};

class Build : public Versioned {
 public:
  InterfaceInfo interface() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
  virtual int32_t configure(const DynamicTensorDesc* inputs, int32_t input_count, const DynamicTensorDesc* outputs,
                            int32_t output_count) noexcept = 0;
  virtual int32_t output_types(DataType* outputs, int32_t output_count, const DataType* inputs,
                               int32_t input_count) const noexcept = 0;
  virtual int32_t output_shapes(const DimsExpressions* inputs, int32_t input_count, const DimsExpressions* shapes,
                                int32_t shape_count, DimsExpressions* outputs, int32_t output_count,
                                ExpressionBuilder& builder) noexcept = 0;
  virtual bool supports(int32_t position, const DynamicTensorDesc* tensors, int32_t input_count,
                        int32_t output_count) noexcept = 0;
  virtual int32_t output_count() const noexcept = 0;
  virtual std::size_t workspace(const DynamicTensorDesc* inputs, int32_t input_count, const DynamicTensorDesc* outputs,
                                int32_t output_count) const noexcept = 0;
  virtual int32_t valid_tactics(int32_t*, int32_t) noexcept { return 0; }
  virtual int32_t tactic_count() noexcept { return 0; }
  virtual const char* timing_cache_id() noexcept { return nullptr; }
  virtual int32_t format_limit() noexcept { return 100; }
  virtual const char* metadata() noexcept { return nullptr; }
};

// With outputs that are an input written in place.
class BuildV2 : public Build {
 public:
  InterfaceInfo interface() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 2, 0}; }
  virtual int32_t aliased_input(int32_t output) noexcept = 0;
};

struct ResourceContext;
class Runtime : public Versioned {
 public:
  InterfaceInfo interface() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
  virtual int32_t set_tactic(int32_t) noexcept { return 0; }
  virtual int32_t on_shape_change(const TensorDesc* inputs, int32_t input_count, const TensorDesc* outputs,
                                  int32_t output_count) noexcept = 0;
  virtual int32_t enqueue(const TensorDesc* input_descs, const TensorDesc* output_descs, const void* const* inputs,
                          void* const* outputs, void* workspace, Stream stream) noexcept = 0;
  virtual Plugin* attach(ResourceContext* context) noexcept = 0;
  virtual const Fields* fields_to_serialize() noexcept = 0;
};

class Creator : public Versioned {
 public:
  InterfaceInfo interface() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
  virtual Plugin* create(const char* name, const Fields* fields, Phase phase) noexcept = 0;
  virtual const Fields* field_names() noexcept = 0;
  virtual const char* name() const noexcept = 0;
  virtual const char* version() const noexcept = 0;
  virtual const char* name_space() const noexcept = 0;
};

// The application's log. TensorRT 11 gave both classes the base Versioned: see log.cc for how they are told apart.
class Logger10 {
 public:
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~Logger10() = default;
};
class LoggerFinder10 {
 public:
  virtual Logger10* logger() = 0;
  virtual ~LoggerFinder10() = default;
};
class Logger11 : public Versioned {
 public:
  virtual void log(Severity severity, const char* message) noexcept = 0;
};
class LoggerFinder11 : public Versioned {
 public:
  virtual Logger11* logger() = 0;
};

}  // namespace edgelm::trt
