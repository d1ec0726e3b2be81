// Attribute `activations`: whether products with integer weights take their activations in int8 or in float32.
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

  // Float kinds have no other way than float32.
  bool Int8(const Matrix& matrix) const { return int8_ && matrix.integer(); }

 private:
  bool int8_;
};

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_ACTIVATIONS_H_
