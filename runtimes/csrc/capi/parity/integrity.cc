#include "capi/parity/integrity.h"

#include <algorithm>

#include "capi/common/files.h"

namespace edgelm::capi {
namespace {

constexpr std::uint64_t kPart = 8 << 20;

// The manifest's files in its order.
const Json::Object& files_of(const Bundle& bundle) { return bundle.manifest().json.find("files")->object(); }

std::string sha256_of(const std::string& path, const std::function<void(std::int64_t)>& advance) {
  const MappedFile file(path, EDGELM_BUNDLE);
  Sha256 hash;
  for (std::uint64_t at = 0; at < file.size();) {
    file.check();
    const std::uint64_t size = std::min(kPart, file.size() - at);
    hash.update(file.data() + at, std::size_t(size));
    at += size;
    advance(std::int64_t(size));
  }
  return hash.hex();
}

std::vector<std::string> damaged_tensors(const Bundle& bundle) {
  std::vector<std::string> problems;
  const std::string& name = bundle.manifest().weights_file;
  const MappedFile file(bundle.file(name), EDGELM_BUNDLE);
  for (const TensorEntry& tensor : bundle.manifest().tensors) {
    file.check();
    const std::uint64_t start = std::min(tensor.offset, file.size());
    const std::uint64_t size = std::min(tensor.size, file.size() - start);
    if (crc32(file.data() + start, std::size_t(size)) == tensor.crc32) continue;
    const std::string where = tensor.layer ? concat(" (layer ", *tensor.layer, ")") : "";
    problems.push_back(concat(name, ": tensor ", tensor.name, where, " differs from what was exported"));
  }
  return problems;
}

}  // namespace

std::int64_t bundle_bytes(const Bundle& bundle) {
  std::int64_t total = 0;
  for (const auto& [name, info] : bundle.manifest().files) total += std::int64_t(info.size);
  return total;
}

std::vector<std::string> damaged_files(const Bundle& bundle, const std::function<void(std::int64_t)>& advance) {
  const Manifest& manifest = bundle.manifest();
  std::vector<std::string> problems;
  for (const auto& [name, info] : files_of(bundle)) {
    if (sha256_of(bundle.file(name), advance) == manifest.files.at(name).sha256) continue;
    std::vector<std::string> named;
    if (name == manifest.weights_file) named = damaged_tensors(bundle);
    if (named.empty()) named = {name + ": contents differ from what was exported"};
    problems.insert(problems.end(), named.begin(), named.end());
  }
  return problems;
}

}  // namespace edgelm::capi
