#include "weights.h"

#include <cstring>

namespace edgelm::ort {
namespace {

// A tensor's offset in the file decides its address: a damaged file must not cause a misaligned read.
void CheckAligned(const void* data, const std::string& what) {
  constexpr size_t kFloat = alignof(float);
  if (reinterpret_cast<uintptr_t>(data) % kFloat != 0) {
    Fail(what, " begin at an address that is not a multiple of ", int64_t{kFloat},
         ": align them, or export the bundle again");
  }
}

const uint8_t* Blob(const Tensor& tensor, const char* what) {
  if (tensor.shape.rank != 1) Fail(what, " must be packed weights, uint8 [bytes], and has shape ", tensor.shape);
  return tensor.As<uint8_t>();
}

Matrix ParseAt(const uint8_t* blob, int64_t size, const std::string& what) {
  Matrix matrix;
  const char* wrong = ParseMatrix(blob, size, &matrix);
  if (wrong != nullptr) Fail(what, ": not a packed matrix, ", wrong, " (", size, " bytes)");
  CheckAligned(blob, what);
  return matrix;
}

// Check that an expert's shapes agree with each other and with expert 0's. Each call checks them against the layer.
void CheckExpert(const Expert& expert, const Expert& first, int64_t index) {
  const Matrix &gate_up = expert.gate_up, &down = expert.down;
  if (!gate_up.swiglu) Fail("experts' gate_up of expert ", index, " is not a SwiGLU matrix");
  if (down.swiglu) Fail("experts' down of expert ", index, " is a SwiGLU matrix");
  if (gate_up.columns != first.gate_up.columns) {
    Fail("experts' gate_up of expert ", index, " is for ", gate_up.columns, " columns, expected as for expert 0, ",
         first.gate_up.columns);
  }
  if (gate_up.rows != first.gate_up.rows) {
    Fail("experts' gate_up of expert ", index, " has ", gate_up.rows, " rows, expected as for expert 0, ",
         first.gate_up.rows);
  }
  if (down.columns != gate_up.outputs()) {
    Fail("experts' down of expert ", index, " is for ", down.columns, " columns, expected the outputs of its gate_up, ",
         gate_up.outputs());
  }
  if (down.rows != gate_up.columns) {
    Fail("experts' down of expert ", index, " has ", down.rows, " rows, expected the columns of its gate_up, ",
         gate_up.columns);
  }
}

}  // namespace

MatrixInput::MatrixInput(const Node& node, size_t index, const char* what) : index_(index), what_(what) {
  Tensor tensor;
  constant_ = node.Constant(index, &tensor);
  if (constant_) matrix_ = Parse(tensor);
}

Matrix MatrixInput::Parse(const Tensor& tensor) const {
  return ParseAt(Blob(tensor, what_), tensor.shape.elements(), what_);
}

ExpertsInput::ExpertsInput(const Node& node, size_t index) : index_(index) {
  Tensor tensor;
  constant_ = node.Constant(index, &tensor);
  if (constant_) experts_ = Parse(tensor);
}

const std::vector<Expert>& ExpertsInput::Get(const Run& run, std::vector<Expert>* own) const {
  if (constant_) return experts_;
  *own = Parse(run.Required(index_, "experts"));
  return *own;
}

std::vector<Expert> ExpertsInput::Parse(const Tensor& tensor) {
  const uint8_t* blob = Blob(tensor, "experts");
  const int64_t size = tensor.shape.elements();
  ExpertsHeader header;
  constexpr int64_t kHead = sizeof header;
  if (size < kHead) Fail("experts: ", size, " bytes are too few for packed experts");
  std::memcpy(&header, blob, sizeof header);
  if (std::memcmp(header.magic, "EDLX", 4) != 0) {
    Fail("experts: the packed experts do not begin with EDLX: export the bundle again");
  }
  if (header.version != kLayoutVersion) {
    Fail("experts: the layout version is ", int64_t{header.version}, ", not ", int64_t{kLayoutVersion});
  }
  if (header.bytes < kHead || header.bytes > size) {
    Fail("experts: the header says ", header.bytes, " bytes, the input has ", size);
  }
  if (header.experts < 1 || header.experts > (header.bytes - kHead) / 16) {
    Fail("experts: the header says ", header.experts, " experts, too many for ", header.bytes, " bytes");
  }
  std::vector<Expert> experts(static_cast<size_t>(header.experts));
  for (int64_t i = 0; i < header.experts; ++i) {
    int64_t at[2];
    std::memcpy(at, blob + kHead + 16 * i, sizeof at);
    Matrix* const parts[2] = {&experts[i].gate_up, &experts[i].down};
    for (int part = 0; part < 2; ++part) {
      const std::string what = (part == 0 ? "experts' gate_up of expert " : "experts' down of expert ") + Text(i);
      if (at[part] < kHead || at[part] >= header.bytes) Fail(what, " begins at byte ", at[part], " of ", header.bytes);
      if (at[part] % kAlignment != 0) Fail(what, " begins at byte ", at[part], ", expected a multiple of ", kAlignment);
      *parts[part] = ParseAt(blob + at[part], header.bytes - at[part], what);
    }
    CheckExpert(experts[i], experts[0], i);
  }
  return experts;
}

VectorInput::VectorInput(const Node& node, size_t index, const char* what) : index_(index), what_(what) {
  constant_ = node.Constant(index, &tensor_);
}

bool VectorInput::Read(const Run& run, Tensor* tensor) const {
  *tensor = tensor_;
  return constant_ || run.Input(index_, tensor);
}

const float* VectorInput::Get(const Run& run, int64_t length, const char* of) const {
  Tensor tensor;
  if (!Read(run, &tensor)) return nullptr;
  if (!(tensor.shape == Shape{length})) {
    Fail(what_, " has shape ", tensor.shape, ", expected ", Shape{length}, ", ", of);
  }
  CheckAligned(tensor.data, what_);
  return tensor.As<float>();
}

const float* VectorInput::Get(const Run& run, int64_t length, const char* of, int64_t part, bool* is_part) const {
  Tensor tensor;
  if (!Read(run, &tensor)) return nullptr;
  *is_part = tensor.shape == Shape{part};
  if (!*is_part && !(tensor.shape == Shape{length})) {
    Fail(what_, " has shape ", tensor.shape, ", expected ", Shape{length}, ", ", of, ", or ", Shape{part},
         ", one value per element of a head");
  }
  CheckAligned(tensor.data, what_);
  return tensor.As<float>();
}

const float* Residual(const Run& run, size_t index, const Shape& shape) {
  Tensor tensor;
  if (!run.Input(index, &tensor)) return nullptr;
  if (!(tensor.shape == shape)) Fail("residual has shape ", tensor.shape, ", expected ", shape, " like the result");
  return tensor.As<float>();
}

}  // namespace edgelm::ort
