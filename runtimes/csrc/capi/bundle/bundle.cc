#include "capi/bundle/bundle.h"

#include <algorithm>
#include <set>

#include "capi/bundle/manifest_schema.h"
#include "capi/common/files.h"

namespace edgelm::capi {

namespace {

constexpr const char* kManifest = "manifest.json";
constexpr const char* kFormat = "edgelm-bundle";
constexpr std::int64_t kFormatVersion = 1;
constexpr std::uint64_t kMaxBytes = 8 << 20;  // OLMoE's manifest has 1 MB
constexpr const char* kAdvice = "export the bundle again";

bool is_inside(const std::string& name) {
  if (name.empty() || name[0] == '/' || name.find('\0') != std::string::npos) return false;
#if defined(_WIN32)
  if (name.find_first_of("\\:") != std::string::npos) return false;
#endif
  return ("/" + name + "/").find("/../") == std::string::npos;
}

Json read_manifest(const std::string& where) {
  const std::string text = read_file(where, kMaxBytes, EDGELM_BUNDLE);
  Json json;
  try {
    json = Json::parse(text, where, EDGELM_BUNDLE, /*unique=*/true);
  } catch (const Error& error) {
    fail(EDGELM_BUNDLE, error.what(), ": ", kAdvice);
  }
  const Json* format = json.find("format");
  if (format == nullptr || !format->is_string() || format->string() != kFormat) {
    fail(EDGELM_BUNDLE, where, " is not the manifest of an EdgeLM bundle (no \"format\": \"", kFormat, "\")");
  }
  const Json* version = json.find("format_version");
  if (version == nullptr || !version->is_integer() || version->integer() != kFormatVersion) {
    const bool newer = version != nullptr && version->is_integer() && version->integer() > kFormatVersion;
    fail(EDGELM_BUNDLE, where, ": format_version is ", version == nullptr ? "missing" : shown(*version),
         ", this EdgeLM reads ", kFormatVersion, ": ", newer ? "upgrade EdgeLM" : kAdvice);
  }
  manifest_schema().require(json, where, kAdvice, EDGELM_BUNDLE);
  return json;
}

// The fields of a document that the schema has accepted.
std::int64_t integer(const Json& json, const char* key, std::int64_t otherwise = 0) {
  const Json* found = json.find(key);
  return found == nullptr ? otherwise : found->integer();
}

std::optional<std::int64_t> optional_integer(const Json& json, const char* key) {
  const Json* found = json.find(key);
  return found == nullptr || found->is_null() ? std::nullopt : std::optional(found->integer());
}

ModelInfo model_of(const Json& json) {
  ModelInfo model;
  model.family = json.find("family")->string();
  if (model.family == "fox") model.family = "llama";  // its name in older bundles, after its first model
  model.name = json.find("name")->string();
  model.hidden_size = integer(json, "hidden_size");
  model.num_layers = integer(json, "num_layers");
  model.num_heads = integer(json, "num_heads");
  model.num_kv_heads = integer(json, "num_kv_heads");
  model.head_dim = integer(json, "head_dim");
  model.vocab_size = integer(json, "vocab_size");
  model.context_length = integer(json, "context_length");
  model.tied = json.find("tied")->boolean();
  model.num_experts = integer(json, "num_experts");
  model.experts_per_token = integer(json, "experts_per_token");
  const Json* norm = json.find("norm_topk_prob");
  model.norm_topk_prob = norm != nullptr && norm->boolean();
  return model;
}

void read_graph(const Json& json, Manifest& manifest) {
  manifest.graph_file = json.find("file")->string();
  manifest.debug_file = json.find("debug_file")->string();
  manifest.weights_file = json.find("weights_file")->string();
  const Json* kv = json.find("kv_dtype");
  manifest.kv_dtype = kv == nullptr ? "float32" : kv->string();
}

void read_tokens(const Json& json, Manifest& manifest) {
  manifest.bos_id = optional_integer(json, "bos_id");
  manifest.pad_id = optional_integer(json, "pad_id");
  for (const Json& id : json.find("eos_ids")->array()) manifest.eos_ids.push_back(id.integer());
}

void read_lists(const Json& json, Manifest& manifest) {
  for (const auto& [name, file] : json.find("files")->object()) {
    manifest.files[name] = {static_cast<std::uint64_t>(integer(file, "size")), file.find("sha256")->string()};
  }
  for (const Json& tensor : json.find("tensors")->array()) {
    manifest.tensors.push_back({tensor.find("name")->string(), static_cast<std::uint64_t>(integer(tensor, "offset")),
                                static_cast<std::uint64_t>(integer(tensor, "size")),
                                static_cast<std::uint32_t>(integer(tensor, "crc32")),
                                optional_integer(tensor, "layer")});
  }
  if (const Json* needs = json.find("requires")) {
    for (const Json& need : needs->array()) {
      manifest.requires_.push_back(
          {need.find("package")->string(), need.find("version")->string(), need.find("feature")->string()});
    }
  }
}

Manifest manifest_of(Json json) {
  Manifest manifest;
  manifest.model = model_of(*json.find("model"));
  manifest.target = json.find("target")->string();
  manifest.ops = json.find("ops")->string();
  manifest.dtype = json.find("dtype")->string();
  manifest.recipe_name = json.find("recipe")->find("name")->string();
  manifest.recipe_toml = json.find("recipe")->find("toml")->string();
  read_graph(*json.find("graph"), manifest);
  read_tokens(*json.find("tokens"), manifest);
  read_lists(json, manifest);
  manifest.json = std::move(json);
  return manifest;
}

// The first contradiction between tensors and the weights file; empty if there is none.
std::string tensor_problem(const Manifest& manifest) {
  std::vector<const TensorEntry*> tensors;
  for (const TensorEntry& tensor : manifest.tensors) tensors.push_back(&tensor);
  std::stable_sort(tensors.begin(), tensors.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
  const std::uint64_t weights = manifest.files.at(manifest.weights_file).size;
  std::uint64_t end = 0;
  for (const TensorEntry* tensor : tensors) {
    if (tensor->offset < end) return concat("the tensor ", quoted(tensor->name), " overlaps the one before it");
    end = tensor->offset + tensor->size;
    if (end > weights) {
      return concat("the tensor ", quoted(tensor->name), " ends at ", end, ", and ", manifest.weights_file, " at ",
                    weights);
    }
  }
  std::set<std::int64_t> layers;
  for (const TensorEntry& tensor : manifest.tensors) {
    if (tensor.layer) layers.insert(*tensor.layer);
  }
  const std::int64_t count = static_cast<std::int64_t>(layers.size()), expected = manifest.model.num_layers;
  if (count > 0 && (count != expected || *layers.rbegin() != expected - 1)) {
    return concat("model.num_layers is ", expected, ", and tensors belong to ", count, " layers");
  }
  return "";
}

// The first contradiction between fields; empty if there is none.
std::string problem_of(const Manifest& manifest) {
  const ModelInfo& model = manifest.model;
  if (model.num_heads % model.num_kv_heads != 0) {
    return concat("model.num_heads is ", model.num_heads, ", no multiple of num_kv_heads, ", model.num_kv_heads);
  }
  if (model.experts_per_token > model.num_experts) {
    return concat("model.experts_per_token is ", model.experts_per_token, ", and num_experts ", model.num_experts);
  }
  for (const Requirement& need : manifest.requires_) {
    if (version_numbers(need.version).empty()) {
      return concat("requires ", need.package, " of a version that is none: ", quoted(need.version));
    }
  }
  for (const auto& [name, file] : manifest.files) {
    if (!is_inside(name)) return concat("names a file outside the bundle: ", quoted(name));
  }
  for (const std::string& name : {manifest.graph_file, manifest.debug_file, manifest.weights_file}) {
    if (manifest.files.count(name) == 0) return concat("does not list ", quoted(name));
  }
  return tensor_problem(manifest);
}

}  // namespace

std::vector<int> version_numbers(const std::string& version) {
  std::vector<int> numbers;
  std::size_t at = 0;
  while (numbers.size() < 3) {
    const std::size_t begin = numbers.empty() ? at : at + 1;
    if (!numbers.empty() && (at >= version.size() || version[at] != '.')) break;
    int number = 0;
    std::size_t end = begin;
    while (end < version.size() && end - begin < 6 && version[end] >= '0' && version[end] <= '9') {
      number = number * 10 + (version[end++] - '0');
    }
    if (end == begin) break;
    numbers.push_back(number);
    at = end;
  }
  return numbers;
}

Bundle Bundle::open(const std::string& path) {
  const char* hint = ": give the folder that `edgelm export -o` wrote";
  if (path.empty() || path.find('\0') != std::string::npos) fail(EDGELM_BUNDLE, quoted(path), " is not a path", hint);
  if (!is_folder(path)) fail(EDGELM_BUNDLE, path, is_file(path) ? " is not a folder" : " does not exist", hint);
  const std::string where = join(path, kManifest);
  if (!is_file(where)) {
    fail(EDGELM_BUNDLE, path, " is not a bundle: it has no ", kManifest,
         is_file(join(path, "config.json")) ? " (this looks like a checkpoint: export it first)" : "");
  }
  Bundle bundle;
  bundle.path_ = path;
  bundle.manifest_ = manifest_of(read_manifest(where));
  const std::string problem = problem_of(bundle.manifest_);
  if (!problem.empty()) fail(EDGELM_BUNDLE, where, ": ", problem, ": ", kAdvice);
  for (const auto& [name, info] : bundle.manifest_.files) {
    const std::string file = bundle.file(name);
    if (!is_file(file)) fail(EDGELM_BUNDLE, path, ": ", name, " is missing; copy or export the bundle again");
    const std::uint64_t size = file_size(file, EDGELM_BUNDLE);
    if (size != info.size) {
      fail(EDGELM_BUNDLE, file, " has ", size, " bytes, the manifest says ", info.size,
           ": copy or export the bundle again");
    }
  }
  return bundle;
}

std::string Bundle::file(const std::string& name) const { return join(path_, name); }

}  // namespace edgelm::capi
