// The arrays of a parity pack by name, as pack.json lists them and pack.npz holds them.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "capi/common/json.h"

namespace edgelm::capi {

// One of the two vectors has the values.
struct PackArray {
  std::vector<std::int64_t> shape;
  std::vector<float> floats;
  std::vector<std::int32_t> ints;
};
using PackArrays = std::map<std::string, PackArray>;

// Read the arrays that `listed`, the checked "arrays" of pack.json, names. Throws Error(EDGELM_BUNDLE).
PackArrays read_pack_arrays(const std::string& npz, const Json& listed);

}  // namespace edgelm::capi
