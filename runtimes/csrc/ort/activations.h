// Attribute `activations`: the type in which activations are multiplied with integer weights, int8 or float32.
#ifndef EDGELM_ORT_ACTIVATIONS_H_
#define EDGELM_ORT_ACTIVATIONS_H_

#include "op.h"

namespace edgelm::ort {

class Activations {
 public:
  explicit Activations(const Node& node) {
    const std::string value = node.String("activations", "int8");
    if (value != "int8" && value != "float32") Fail("attribute activations is ", value, ", expected int8 or float32");
    int8_ = value == "int8";
  }

  // Float weights always take float32 activations.
  bool Int8(const Matrix& matrix) const { return int8_ && matrix.integer(); }

 private:
  bool int8_;
};

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_ACTIVATIONS_H_
