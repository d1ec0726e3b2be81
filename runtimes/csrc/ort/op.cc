#include "op.h"

#include <cstring>

namespace edgelm::ort {

void Check(const OrtApi* api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = GetErrorMessage(api, status);
  ReleaseStatus(api, status);
  throw Failure{message};
}

bool operator==(const Shape& a, const Shape& b) {
  return a.rank == b.rank && std::memcmp(a.dims, b.dims, a.rank * sizeof a.dims[0]) == 0;
}

std::string Text(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.rank; ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

namespace {

Tensor View(const OrtApi* api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(api, GetTensorTypeAndShape(api, value, &info));
  Tensor tensor;
  OrtStatus* status = GetDimensionsCount(api, info, &tensor.shape.rank);
  const bool fits = status == nullptr && tensor.shape.rank <= Shape::kMost;
  if (fits) status = GetDimensions(api, info, tensor.shape.dims, tensor.shape.rank);
  ReleaseTensorTypeAndShapeInfo(api, info);
  Check(api, status);
  if (!fits) Fail("an input has ", static_cast<int64_t>(tensor.shape.rank), " dimensions, expected at most 8");
  void* data = nullptr;
  Check(api, GetTensorMutableData(api, const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

}  // namespace

bool Node::Succeeds(OrtStatus* status) const {
  if (status != nullptr) ReleaseStatus(api_, status);
  return status == nullptr;
}

// The status is the same for a missing attribute and one of another type; only its message differs, which is not ABI.
void Node::CheckAbsent(const char* name, const char* type) const {
  float number;
  int64_t integer;
  size_t size = 0;
  if (Succeeds(GetAttributeFloat(api_, info_, name, &number)) ||
      Succeeds(GetAttributeInt64(api_, info_, name, &integer)) ||
      Succeeds(GetAttributeString(api_, info_, name, nullptr, &size))) {
    Fail("attribute ", name, " is not ", type);
  }
}

std::string Node::Name() const {
  const std::string name = String("name", "");
  if (!name.empty()) return name;
  size_t size = 0;
  Check(api_, GetNodeName(api_, info_, nullptr, &size));
  std::string text(size, '\0');
  Check(api_, GetNodeName(api_, info_, text.data(), &size));
  return text.c_str();  // without the terminating zero that `size` counts
}

int64_t Node::Int(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  if (Succeeds(GetAttributeInt64(api_, info_, name, &value))) return value;
  CheckAbsent(name, "an integer");
  return otherwise;
}

float Node::Float(const char* name, float otherwise) const {
  float value = 0;
  if (Succeeds(GetAttributeFloat(api_, info_, name, &value))) return value;
  CheckAbsent(name, "a float");
  return otherwise;
}

std::string Node::String(const char* name, const std::string& otherwise) const {
  size_t size = 0;
  if (!Succeeds(GetAttributeString(api_, info_, name, nullptr, &size))) {
    CheckAbsent(name, "a string");
    return otherwise;
  }
  std::string text(size, '\0');
  Check(api_, GetAttributeString(api_, info_, name, text.data(), &size));
  return text.c_str();
}

bool Node::Constant(size_t index, Tensor* tensor) const {
  int constant = 0;
  const OrtValue* value = nullptr;
  Check(api_, GetConstantInput(api_, info_, index, &constant, &value));
  if (constant == 0 || value == nullptr) return false;
  *tensor = View(api_, value);
  return true;
}

Run::Run(const OrtApi* api, OrtKernelContext* context) : api_(api), context_(context), inputs_(0) {
  Check(api, GetInputCount(api, context, &inputs_));
}

bool Run::Input(size_t index, Tensor* tensor) const {
  if (index >= inputs_) return false;
  const OrtValue* value = nullptr;
  Check(api_, GetInput(api_, context_, index, &value));
  if (value == nullptr) return false;
  *tensor = View(api_, value);
  return true;
}

Tensor Run::Required(size_t index, const char* name) const {
  Tensor tensor;
  if (!Input(index, &tensor)) Fail("input ", name, " is missing");
  return tensor;
}

void* Run::RawOutput(size_t index, const Shape& shape) const {
  OrtValue* value = nullptr;
  Check(api_, GetOutput(api_, context_, index, shape.dims, shape.rank, &value));
  if (value == nullptr) return nullptr;
  void* data = nullptr;
  Check(api_, GetTensorMutableData(api_, value, &data));
  return data;
}

}  // namespace edgelm::ort
