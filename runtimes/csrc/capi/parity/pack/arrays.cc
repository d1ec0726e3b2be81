#include "capi/parity/pack/arrays.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "capi/common/files.h"
#include "capi/parity/pack/npz.h"

namespace edgelm::capi {
namespace {

// What a pack may unpack to: this, and its file's size times that. Real ones shrink by a tenth.
constexpr std::uint64_t kUnpackedBytes = 64 << 20, kUnpackedTimes = 16;
constexpr std::uint64_t kMostBytes = UINT64_MAX >> 2;

[[noreturn]] void refuse(const std::string& path, const std::string& problem) {
  fail(EDGELM_BUNDLE, path, ": ", problem, ": export the bundle again");
}

// Whether an array holds integers, by the part of its name after the last dot.
bool is_integer(const std::string& name) {
  static const std::set<std::string> names = {"ids", "top_ids", "probe_ids", "best", "experts", "rows", "flipped"};
  return names.count(name.substr(name.rfind('.') + 1)) != 0;
}

// What the index says of an array.
struct Listed {
  std::vector<std::int64_t> shape;
  std::string type;
  std::uint64_t bytes;
};

Listed read_listed(const Json& entry) {
  Listed listed = {{}, entry.find("dtype")->string(), 4};
  for (const Json& json : entry.find("shape")->array()) {
    const std::uint64_t size = std::uint64_t(json.integer());
    listed.shape.push_back(json.integer());
    // Saturates: no file has so many bytes.
    listed.bytes = size != 0 && listed.bytes > kMostBytes / size ? kMostBytes : listed.bytes * size;
  }
  return listed;
}

PackArray read_array(const ZipArchive& archive, const std::string& path, const std::string& name,
                     const Listed& listed) {
  const std::vector<unsigned char> file = archive.read(name + ".npy", std::size_t(listed.bytes) + kMostNpyHeader);
  const NpyHeader header = read_npy_header(file.data(), file.size());
  const bool integers = is_integer(name);
  if (header.shape != listed.shape || header.by_columns || listed.type != (integers ? "int32" : "float32") ||
      header.type != (integers ? "<i4" : "<f4")) {
    refuse(path, "array '" + name + "' is not what pack.json says");
  }
  if (file.size() - header.size < listed.bytes) throw Damaged("array '" + name + "' ends early");
  if (file.size() - header.size > listed.bytes) {
    throw Damaged("array '" + name + "' is longer than its header says");
  }
  PackArray array;
  array.shape = listed.shape;
  const auto copy = [&](auto& values) {
    values.resize(std::size_t(listed.bytes / 4));
    if (listed.bytes) std::memcpy(values.data(), file.data() + header.size, std::size_t(listed.bytes));
  };
  if (integers) {
    copy(array.ints);
  } else {
    copy(array.floats);
  }
  return array;
}

}  // namespace

PackArrays read_pack_arrays(const std::string& npz, const Json& listed) {
  std::map<std::string, Listed> list;
  for (const auto& [name, entry] : listed.object()) list.emplace(name, read_listed(entry));
  if (!is_file(npz)) refuse(npz, "is missing");
  const MappedFile file(npz, EDGELM_BUNDLE);
  file.check();
  std::uint64_t total = 0;
  for (const auto& [name, entry] : list) total = std::min(total + entry.bytes, kMostBytes);
  if (total > kUnpackedBytes + kUnpackedTimes * file.size()) {
    refuse(npz, concat("unpacks to ", total, " bytes, too many for its size"));
  }
  try {
    const ZipArchive archive(file.data(), std::size_t(file.size()));
    PackArrays arrays;
    for (const auto& [name, entry] : list) {
      if (!archive.has(name + ".npy")) refuse(npz, "has no array " + name);
      arrays.emplace(name, read_array(archive, npz, name, entry));
    }
    return arrays;
  } catch (const Damaged& error) {
    refuse(npz, concat("cannot be read (", error.what(), ")"));
  }
}

}  // namespace edgelm::capi
