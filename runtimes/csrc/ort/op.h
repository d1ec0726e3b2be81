// What the operators share: failures with a message, views of tensors, attributes, and the boundary to the runtime.
//
// Inside an operator a failure is an exception of type Failure. Guarded() turns it, and a failed allocation, into a
// status that names operator and node; no exception crosses the C ABI, and none is thrown by the pieces of a
// ParallelFor, which run on the runtime's threads.
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

struct Failure {
  std::string message;
};

inline std::string Text(std::string text) { return text; }
inline std::string Text(const char* text) { return text; }
inline std::string Text(int64_t number) { return std::to_string(number); }

template <typename... Parts>
[[noreturn]] void Fail(const Parts&... parts) {
  throw Failure{(Text(parts) + ...)};
}

// Throws what a status of the runtime says, if it is one, and releases it.
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
    int64_t product = 1;
    for (size_t i = 0; i < rank; ++i) product *= dims[i];
    return product;
  }
};

bool operator==(const Shape& a, const Shape& b);
std::string Text(const Shape& shape);  // "[2, 3, 64]"

// An input as it lies in memory. Its type is the one that the operator declares: the runtime refuses a model with any
// other.
struct Tensor {
  const void* data = nullptr;
  Shape shape;

  // Fails where it lies at no multiple of T's alignment: a tensor's offset in a damaged file decides that.
  template <typename T>
  const T* As() const {
    if (reinterpret_cast<uintptr_t>(data) % alignof(T) != 0) {
      Fail("an input of shape ", Text(shape), " begins at an address that is no multiple of ", int64_t{alignof(T)},
           ": align it, or export the bundle again");
    }
    return static_cast<const T*>(data);
  }
};

// A node of the graph, while its kernel is made.
class Node {
 public:
  Node(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  const OrtApi* api() const { return api_; }
  // Attribute `name` where there is one, else what the graph calls the node.
  std::string Name() const;
  // Attributes, or `otherwise` where they are not given. One of another type is a failure.
  int64_t Int(const char* name, int64_t otherwise) const;
  float Float(const char* name, float otherwise) const;
  std::string String(const char* name, const std::string& otherwise) const;
  // Whether input `index` is the same for every run, and then its tensor, which stays where it is.
  bool Constant(size_t index, Tensor* tensor) const;

 private:
  // Releases a status of failure.
  bool Succeeds(OrtStatus* status) const;
  // After an attribute could not be read as `type`: throws if there is one of another type.
  void CheckAbsent(const char* name, const char* type) const;

  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

// One call of a kernel.
class Run {
 public:
  Run(const OrtApi* api, OrtKernelContext* context);

  // False where an optional input is not given.
  bool Input(size_t index, Tensor* tensor) const;
  Tensor Required(size_t index, const char* name) const;
  // nullptr where nobody wants an optional output.
  template <typename T>
  T* Output(size_t index, const Shape& shape) const {
    return static_cast<T*>(RawOutput(index, shape));
  }

  // Calls piece(i) for i in [0, pieces) on the session's threads, each as soon as a thread is free. What the pieces are
  // must not depend on how many threads there are: that is why results do not either. A call costs 2 to 5 us.
  template <typename Piece>
  void ParallelFor(int64_t pieces, const Piece& piece) const {
    if (pieces <= 0) return;
    if (pieces == 1) return piece(int64_t{0});
    const auto work = [](void* user, size_t i) noexcept {
      (*static_cast<const Piece*>(user))(static_cast<int64_t>(i));
    };
    const size_t total = static_cast<size_t>(pieces);
    Check(api_, KernelParallelFor(api_, context_, work, total, total, const_cast<Piece*>(&piece)));
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

// Runs `body` and turns what it throws into a status "operator node: message".
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

// The OrtCustomOp of a kernel class, which has
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

// The kernels of this machine's instruction set, chosen when the library is registered.
const Kernels& ChosenKernels();

// One for each operator, for the life of the library.
const OrtCustomOp* QuantEmbeddingOp();
const OrtCustomOp* QuantLinearOp();
const OrtCustomOp* SparseMoeOp();
const OrtCustomOp* GroupQueryAttentionOp();
const OrtCustomOp* RmsNormOp();

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_OP_H_
