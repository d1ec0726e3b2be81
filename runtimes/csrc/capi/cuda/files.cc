#include "capi/cuda/files.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "capi/common/files.h"
#include "capi/common/json.h"

namespace edgelm::capi {

namespace {

constexpr std::uint64_t kMostBytes = 64 << 20;  // of a file; OLMoE's program has 60 kB
constexpr std::int64_t kMostVersion = 10000;
constexpr std::int64_t kFormat = 1, kKernelsFormat = 2;

[[noreturn]] void refuse(const std::string& where, const std::string& problem) {
  fail(EDGELM_BUNDLE, where, ": ", problem, ": copy or export the bundle again");
}

Json parse(const std::string& path) {
  return Json::parse(read_file(path, kMostBytes, EDGELM_BUNDLE), path, EDGELM_BUNDLE);
}

void check_keys(const Members& members, std::initializer_list<const char*> known) {
  for (const Json::Member& member : members.json().object()) {
    if (std::find(known.begin(), known.end(), member.first) == known.end()) {
      refuse(members.where(), "there is an unknown field " + quoted(member.first));
    }
  }
}

void check_format(const Members& members, std::int64_t expected) {
  const std::int64_t format = members.integer("format");
  if (format == expected) return;
  fail(EDGELM_BUNDLE, members.where(), ": format is ", format, ", this EdgeLM reads ", expected,
       format > expected ? ": upgrade edgelm" : ": copy or export the bundle again");
}

const std::string& text_of(const Json& json, const std::string& where) {
  if (!json.is_string()) refuse(where, "expected a text");
  return json.string();
}

std::vector<std::string> texts(const Members& members, const char* key) {
  std::vector<std::string> found;
  for (const Json& one : members.array(key)) found.push_back(text_of(one, members.where() + ": " + key));
  return found;
}

gpu::Attributes attributes(const Members& members, const char* key) {
  gpu::Attributes found;
  const Members object = members.object(key);
  for (const auto& [name, value] : object.json().object()) {
    if (value.is_integer()) {
      found[name] = {gpu::Attribute::kInteger, std::to_string(value.integer())};
    } else if (value.is_double() && std::isfinite(value.number())) {
      found[name] = {gpu::Attribute::kNumber, python_repr(value.number())};
    } else if (value.is_string()) {
      found[name] = {gpu::Attribute::kText, value.string()};
    } else {
      refuse(object.where(), quoted(name) + " is no number or text");
    }
  }
  return found;
}

gpu::ProgramNode node_of(const Json& json, const std::string& where) {
  const Members members(json, where, EDGELM_BUNDLE);
  check_keys(members, {"op", "name", "inputs", "outputs", "attrs"});
  return {members.string("op"), members.string("name"), texts(members, "inputs"), texts(members, "outputs"),
          attributes(members, "attrs")};
}

gpu::ProgramValue value_of(const Json& json, const std::string& where) {
  if (!json.is_array() || json.array().size() != 2 || !json.array()[1].is_integer()) {
    refuse(where, "expected a type and a width");
  }
  const std::int64_t width = json.array()[1].integer();
  if (width < 1 || width > gpu::kMostSize) {
    refuse(where, concat("is ", width, ", expected a whole number from 1 to ", gpu::kMostSize));
  }
  return {text_of(json.array()[0], where), width};
}

gpu::ProgramWeight weight_of(const Json& json, const std::string& where) {
  const Members members(json, where, EDGELM_BUNDLE);
  check_keys(members, {"type", "dims", "offset", "size"});
  gpu::ProgramWeight weight{members.string("type"),
                            {},
                            std::uint64_t(members.integer("offset", 0)),
                            std::uint64_t(members.integer("size", 0))};
  for (const Json& size : members.array("dims")) {
    if (!size.is_integer()) refuse(where, "dims: expected whole numbers");
    weight.dims.push_back(size.integer());
  }
  return weight;
}

gpu::CudaVersion version_of(const Members& members) {
  const Json::Array& numbers = members.array("nvrtc");
  for (const Json& one : numbers) {
    if (!one.is_integer() || one.integer() < 0 || one.integer() > kMostVersion)
      members.refuse("nvrtc", "is no version");
  }
  if (numbers.size() != 2) members.refuse("nvrtc", "is no version");
  return {int(numbers[0].integer()), int(numbers[1].integer())};
}

bool is_target(const std::string& name) {
  const std::size_t start = name.rfind("sm_", 0) == 0 ? 3 : name.rfind("compute_", 0) == 0 ? 8 : std::string::npos;
  if (start == std::string::npos) return false;
  const std::string number = name.substr(start);
  return (number.size() == 2 || number.size() == 3) && number[0] != '0' &&
         number.find_first_not_of("0123456789") == std::string::npos;
}

// The name of a file in the folder itself.
bool is_file_name(const std::string& name) {
  constexpr char kFirst[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_";
  return !name.empty() && std::string(kFirst).find(name[0]) != std::string::npos &&
         name.find_first_not_of(std::string(kFirst) + ".-") == std::string::npos;
}

}  // namespace

gpu::Program read_program(const std::string& path, bool debug) {
  const Json json = parse(path);
  const Members members(json, path, EDGELM_BUNDLE);
  check_format(members, kFormat);
  check_keys(members, {"format", "nodes", "values", "weights", "exact"});
  gpu::Program program;
  const Json::Array& nodes = members.array("nodes");
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    program.nodes.push_back(node_of(nodes[i], concat(path, ": nodes[", i, "]")));
  }
  for (const auto& [name, value] : members.object("values").json().object()) {
    program.values[name] = value_of(value, path + ": values." + quoted(name));
  }
  for (const auto& [name, weight] : members.object("weights").json().object()) {
    program.weights[name] = weight_of(weight, path + ": weights." + quoted(name));
  }
  program.exact = attributes(members, "exact");
  try {
    program.check();
    if (!debug) return program;
    program = program.debug();
    program.check();
    return program;
  } catch (const gpu::Error& error) {
    throw Error(EDGELM_BUNDLE, error.what());
  }
}

gpu::KernelIndex read_kernel_index(const std::string& folder) {
  const std::string path = join(folder, "kernels.json");
  if (!is_file(path)) fail(EDGELM_BUNDLE, path, " is missing: the bundle holds no GPU kernels; export it again");
  const Json json = parse(path);
  const Members members(json, path, EDGELM_BUNDLE);
  const bool old = members.integer("format") == 1;  // one version of NVRTC for all images
  if (!old) check_format(members, kKernelsFormat);
  gpu::KernelIndex index;
  index.folder = folder;
  const Members bytes = members.object("argument_bytes");
  for (const auto& [name, value] : bytes.json().object()) {
    index.argument_bytes[name] = std::uint64_t(bytes.integer(name, 0));
  }
  const Members images = members.object("images");
  for (const auto& [target, value] : images.json().object()) {
    const Members image(value, path + ": images." + quoted(target), EDGELM_BUNDLE);
    const std::string& file = image.string("file");
    if (!is_target(target)) refuse(image.where(), "expected a name like sm_86 or compute_80");
    if (!is_file_name(file)) image.refuse("file", "is " + quoted(file) + ", expected a file beside kernels.json");
    gpu::KernelIndex::Image found{{target, version_of(old ? members : image)}, join(folder, file), {}};
    if (image.has("waits")) {
      for (const std::string& name : texts(image, "waits")) found.pdl.insert(name);
    }
    index.images.push_back(std::move(found));
  }
  return index;
}

}  // namespace edgelm::capi
