// The check that a bundle's files are those that were exported. As Bundle.verify of edgelm/bundle.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "capi/bundle/bundle.h"

namespace edgelm::capi {

// Bytes of all files that the manifest lists.
std::int64_t bundle_bytes(const Bundle& bundle);

// Check the SHA-256 of every file. Returns one line for each problem, naming the file, and for weights the tensor and its
// layer. `advance` is called with the bytes of each part that was read.
std::vector<std::string> damaged_files(const Bundle& bundle, const std::function<void(std::int64_t)>& advance);

}  // namespace edgelm::capi
