// An opened bundle: the manifest, with the same checks as edgelm/bundle/__init__.py.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "capi/common/json.h"

namespace edgelm::capi {

struct ModelInfo {
  std::string family, name;
  std::int64_t hidden_size, num_layers, num_heads, num_kv_heads, head_dim, vocab_size, context_length;
  bool tied;
  std::int64_t num_experts = 0, experts_per_token = 0;
  bool norm_topk_prob = false;
};

struct FileInfo {
  std::uint64_t size;
  std::string sha256;
};

struct TensorEntry {
  std::string name;
  std::uint64_t offset, size;
  std::uint32_t crc32;
  std::optional<std::int64_t> layer;
};

// A package that the graph needs ("onnxruntime"), its lowest version, and the feature that needs it.
struct Requirement { std::string package, version, feature; };

struct Manifest {
  ModelInfo model;
  std::string target, ops, dtype;
  std::string recipe_name, recipe_toml;
  std::string graph_file, debug_file, weights_file, kv_dtype;
  std::optional<std::int64_t> bos_id, pad_id;
  std::vector<std::int64_t> eos_ids;
  std::map<std::string, FileInfo> files;
  std::vector<TensorEntry> tensors;
  std::vector<Requirement> requires_;
  Json json;  // the whole document
};

// Numbers of a version: "1.31.1" is {1, 31, 1}; empty if it has none.
std::vector<int> version_numbers(const std::string& version);

class Bundle {
 public:
  // Open a folder and check that every file exists and has its size. Throws Error(EDGELM_BUNDLE).
  static Bundle open(const std::string& path);

  const std::string& path() const { return path_; }
  const Manifest& manifest() const { return manifest_; }
  std::string file(const std::string& name) const;  // its path; need not be in the manifest

 private:
  std::string path_;
  Manifest manifest_;
};

}  // namespace edgelm::capi
