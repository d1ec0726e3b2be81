// Inputs that hold weights: packed matrices, a layer's packed experts, vectors. They are constants of the model, so
// their headers are read and checked once, when the kernel is made, and the views are kept: the runtime maps the file
// into memory and leaves it where it is. Where one is not constant it is read at each call.
#ifndef EDGELM_ORT_WEIGHTS_H_
#define EDGELM_ORT_WEIGHTS_H_

#include <vector>

#include "op.h"

namespace edgelm::ort {

class MatrixInput {
 public:
  // `what` names it in messages.
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
  // `own` is room for what is not constant.
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
  // nullptr where it is not given. `length` is what it must have, `of` says why.
  const float* Get(const Run& run, int64_t length, const char* of) const;
  // The same where it may also have `part` values, one for each element of a head: *is_part says whether it does.
  const float* Get(const Run& run, int64_t length, const char* of, int64_t part, bool* is_part) const;

 private:
  bool Read(const Run& run, Tensor* tensor) const;

  size_t index_;
  const char* what_;
  bool constant_;
  Tensor tensor_;
};

// What is added to a result of `shape`, or nullptr where it is not given.
const float* Residual(const Run& run, size_t index, const Shape& shape);

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_WEIGHTS_H_
