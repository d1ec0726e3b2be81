// Inputs that hold weights: packed matrices, a layer's packed experts, vectors.
//
// They are usually constants of the model. Then their headers are read and checked once, when the kernel is created, and
// the views are kept: the runtime maps the file into memory and keeps it in place. An input that is not constant is read
// at each call.
#ifndef EDGELM_ORT_WEIGHTS_H_
#define EDGELM_ORT_WEIGHTS_H_

#include <vector>

#include "op.h"

namespace edgelm::ort {

class MatrixInput {
 public:
  // `what` names the input in messages.
  MatrixInput(const Node& node, size_t index, const char* what);
  Matrix Get(const Run& run) const { return constant_ ? matrix_ : Parse(run.Required(index_, what_)); }

 private:
  Matrix Parse(const Tensor& tensor) const;

  size_t index_;
  const char* what_;
  bool constant_;
  Matrix matrix_;
};

struct Expert {
  Matrix gate_up;
  Matrix down;
};

class ExpertsInput {
 public:
  ExpertsInput(const Node& node, size_t index);
  // `own` stores the experts if the input is not constant.
  const std::vector<Expert>& Get(const Run& run, std::vector<Expert>* own) const;

 private:
  static std::vector<Expert> Parse(const Tensor& tensor);

  size_t index_;
  bool constant_;
  std::vector<Expert> experts_;
};

// An optional vector of floats.
class VectorInput {
 public:
  VectorInput(const Node& node, size_t index, const char* what);
  // Returns nullptr if the input is not given. It must have `length` values; `of` explains that number in messages.
  const float* Get(const Run& run, int64_t length, const char* of) const;
  // The same for an input that may also have `part` values, one per element of a head; *is_part says whether it does.
  const float* Get(const Run& run, int64_t length, const char* of, int64_t part, bool* is_part) const;

 private:
  bool Read(const Run& run, Tensor* tensor) const;

  size_t index_;
  const char* what_;
  bool constant_;
  Tensor tensor_;
};

// The residual, which must have `shape`, or nullptr if it is not given.
const float* Residual(const Run& run, size_t index, const Shape& shape);

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_WEIGHTS_H_
