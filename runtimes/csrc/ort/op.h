// Shared by all operators: failures with a message, views of tensors, attributes, and the interface to ONNX Runtime.
//
// Inside an operator a failure is an exception of type Failure. Guarded() turns it, and a failed allocation, into a
// status that names operator and node, so that no exception crosses the C ABI. The tasks of a ParallelFor run on the
// runtime's threads and must not throw.
#ifndef EDGELM_ORT_OP_H_
#define EDGELM_ORT_OP_H_

#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <new>
#include <string>
#include <utility>

#include "kernels/kernels.h"
#include "abi.h"

namespace edgelm::ort {

struct Failure { std::string message; };

inline std::string Text(std::string text) { return text; }
inline std::string Text(const char* text) { return text; }
inline std::string Text(int64_t number) { return std::to_string(number); }

template <typename... Parts>
[[noreturn]] void Fail(const Parts&... parts) {
  throw Failure{(Text(parts) + ...)};
}

// If `status` is an error, release it and throw its message as a Failure.
void Check(const OrtApi* api, OrtStatus* status);

// Dimensions of a tensor.
struct Shape {
  static constexpr size_t kMost = 8;
  size_t rank = 0;
  int64_t dims[kMost] = {};

  Shape() = default;
  Shape(std::initializer_list<int64_t> list) {
    for (int64_t dim : list) dims[rank++] = dim;
  }
  int64_t operator[](size_t i) const { return dims[i]; }
  int64_t& operator[](size_t i) { return dims[i]; }
  int64_t last() const { return dims[rank - 1]; }
  int64_t elements() const {
    int64_t count = 1;
    for (size_t i = 0; i < rank; ++i) count *= dims[i];
    return count;
  }
};

bool operator==(const Shape& a, const Shape& b);
std::string Text(const Shape& shape);  // "[2, 3, 64]"

// An input in memory. Its type is the one that the operator declares: the runtime refuses a model with another type.
struct Tensor {
  const void* data = nullptr;
  Shape shape;

  // Fails if the address is not aligned for T, which can happen if a damaged file has a wrong offset.
  template <typename T>
  const T* As() const {
    if (reinterpret_cast<uintptr_t>(data) % alignof(T) != 0) {
      Fail("an input of shape ", Text(shape), " begins at an address that is not a multiple of ", int64_t{alignof(T)},
           ": align it, or export the bundle again");
    }
    return static_cast<const T*>(data);
  }
};

// A node of the graph while its kernel is created.
class Node {
 public:
  Node(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  const OrtApi* api() const { return api_; }
  // The attribute `name` if given, otherwise the node's name in the graph.
  std::string Name() const;
  // The attribute's value, or `otherwise` if it is not given. An attribute of another type is a failure.
  int64_t Int(const char* name, int64_t otherwise) const;
  float Float(const char* name, float otherwise) const;
  std::string String(const char* name, const std::string& otherwise) const;
  // Whether input `index` is a constant of the graph; then `tensor` is its value, whose memory stays valid.
  bool Constant(size_t index, Tensor* tensor) const;

 private:
  // Whether the call succeeded. Releases the status if not.
  bool Succeeds(OrtStatus* status) const;
  // Call after an attribute could not be read as `type`: throws if it exists with another type.
  void CheckAbsent(const char* name, const char* type) const;

  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

// One call of a kernel.
class Run {
 public:
  Run(const OrtApi* api, OrtKernelContext* context);

  // False if an optional input is not given.
  bool Input(size_t index, Tensor* tensor) const;
  Tensor Required(size_t index, const char* name) const;
  // nullptr if an optional output is not used.
  template <typename T>
  T* Output(size_t index, const Shape& shape) const {
    return static_cast<T*>(RawOutput(index, shape));
  }

  // Call task(i) for i in [0, tasks) on the session's threads; each thread takes the next task when it is free. Tasks
  // must not depend on the number of threads, so that results do not either. A call costs 2 to 5 us.
  template <typename Task>
  void ParallelFor(int64_t tasks, const Task& task) const {
    if (tasks <= 0) return;
    if (tasks == 1) return task(int64_t{0});
    const auto work = [](void* user, size_t i) noexcept { (*static_cast<const Task*>(user))(static_cast<int64_t>(i)); };
    const size_t total = static_cast<size_t>(tasks);
    Check(api_, KernelParallelFor(api_, context_, work, total, total, const_cast<Task*>(&task)));
  }

 private:
  void* RawOutput(size_t index, const Shape& shape) const;

  const OrtApi* api_;
  OrtKernelContext* context_;
  size_t inputs_;
};

// An input or output as an operator declares it.
struct Declared {
  ElementType type;
  Characteristic characteristic = kRequired;
};

// Run `body`. Return nullptr, or for an exception a status "operator node: message".
template <typename Body>
OrtStatus* Guarded(const OrtApi* api, const char* op, const std::string& node, const Body& body) noexcept {
  const char* message = "not enough memory";
  int code = kFail;
  std::string text;
  try {
    try {
      body();
      return nullptr;
    } catch (const Failure& failure) {
      code = kInvalidArgument;
      text = std::string(op) + (node.empty() ? "" : " " + node) + ": " + failure.message;
      message = text.c_str();
    }
  } catch (const std::bad_alloc&) {
  }
  return CreateStatus(api, code, message);
}

// The OrtCustomOp of a kernel class. The class must have
//   static constexpr const char* kName;  static constexpr Declared kInputs[], kOutputs[];
//   explicit Kernel(const Node&);  void Compute(const Run&) const;
template <typename Kernel>
class Operator : public OrtCustomOp {
 public:
  Operator() : OrtCustomOp{} {
    version = kApiVersion;
    GetName = [](const OrtCustomOp*) { return Kernel::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kInputs); };
    GetInputType = [](const OrtCustomOp*, size_t i) -> int { return Kernel::kInputs[i].type; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int { return Kernel::kInputs[i].characteristic; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kOutputs); };
    GetOutputType = [](const OrtCustomOp*, size_t i) -> int { return Kernel::kOutputs[i].type; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) -> int { return Kernel::kOutputs[i].characteristic; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    CreateKernelV2 = Create;
    KernelComputeV2 = Compute;
    KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
  }

 private:
  struct Instance {
    const OrtApi* api;
    std::string name;
    Kernel kernel;
  };

  static OrtStatus* Create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    std::string name;
    const auto named = [&] { name = Node(api, info).Name(); };
    if (OrtStatus* status = Guarded(api, Kernel::kName, name, named)) return status;
    return Guarded(api, Kernel::kName, name, [&] { *kernel = new Instance{api, name, Kernel(Node(api, info))}; });
  }

  static OrtStatus* Compute(void* kernel, OrtKernelContext* context) {
    const Instance& instance = *static_cast<const Instance*>(kernel);
    return Guarded(instance.api, Kernel::kName, instance.name,
                   [&] { instance.kernel.Compute(Run(instance.api, context)); });
  }
};

// The kernels for this CPU, chosen when the library is registered.
const Kernels& ChosenKernels();

// Choose the kernels and add the operators to a session's options.
OrtStatus* RegisterOperators(OrtSessionOptions* options, const OrtApiBase* base);

// The operators. Each object lives as long as the library.
const OrtCustomOp* QuantEmbeddingOp();
const OrtCustomOp* QuantLinearOp();
const OrtCustomOp* SparseMoeOp();
const OrtCustomOp* GroupQueryAttentionOp();
const OrtCustomOp* RmsNormOp();

// Whether models that this thread runs compute all logits exactly: see edgelm_exact_logits in kernels/cpu.h.
bool& ExactLogits();

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_OP_H_
