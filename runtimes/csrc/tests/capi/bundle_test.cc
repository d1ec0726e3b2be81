// Tests that a damaged or hostile manifest is refused with its reason, as in Python.
#include "capi/bundle/bundle.h"

#include <cstdlib>
#include <functional>

#include "capi/common/files.h"
#include "check.h"
#include "system.h"

namespace {

using namespace edgelm::capi;

const char* const kManifest = R"({
 "model": {"family": "fox", "name": "m", "hidden_size": 8, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2,
           "head_dim": 2, "vocab_size": 9, "context_length": 16, "tied": true},
 "target": "cpu", "ops": "native", "dtype": "bfloat16", "recipe": {"name": "int4", "toml": ""},
 "graph": {"file": "g", "debug_file": "d", "weights_file": "w"},
 "tokens": {"bos_id": 2, "eos_ids": [1, 5], "pad_id": null}, "source": {"id": "m"},
 "files": {"g": {"size": 1, "sha256": "a"}, "d": {"size": 1, "sha256": "b"}, "w": {"size": 9, "sha256": "c"}},
 "tensors": [{"name": "b", "offset": 4, "size": 5, "crc32": 4294967295, "layer": 0,
              "contents": {"layout": "array", "dtype": "float32", "shape": [1]}},
             {"name": "a", "offset": 0, "size": 4, "crc32": 1, "layer": null}],
 "tools": {"edgelm": "0.2.0"}, "requires": [{"package": "onnxruntime", "version": "1.31.1", "feature": "x"}],
 "format": "edgelm-bundle", "format_version": 1})";

class Folder {
 public:
  Folder() {
    path = edgelm_test::MakeFolder();
    write("manifest.json", kManifest);
    write("g", "1");
    write("d", "1");
    write("w", "123456789");
  }
  ~Folder() { edgelm_test::RemoveFolder(path); }
  void write(const std::string& name, const std::string& text) const {
    write_atomically(join(path, name), [&](const auto& put) { put(text.data(), text.size()); });
  }
  // Why the bundle is refused; empty if it is not.
  std::string refusal() const {
    try {
      Bundle::open(path);
      return "";
    } catch (const Error& error) {
      return error.code == EDGELM_BUNDLE ? error.what() : "wrong code";
    }
  }
  std::string path;
};

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  EXPECT(at != std::string::npos, "%s is not in the manifest", from.c_str());
  return text.replace(at, from.size(), to);
}

void TestAGoodManifestIsReadWhole() {
  const Folder folder;
  const Bundle bundle = Bundle::open(folder.path);
  const Manifest& manifest = bundle.manifest();
  EXPECT(manifest.model.family == "llama" && manifest.model.num_kv_heads == 2 && manifest.model.num_experts == 0,
         "model");
  EXPECT(manifest.bos_id == 2 && !manifest.pad_id && manifest.eos_ids.size() == 2, "tokens");
  EXPECT(manifest.kv_dtype == "float32" && manifest.weights_file == "w" && manifest.files.at("w").size == 9, "files");
  EXPECT(manifest.tensors[0].layer == 0 && !manifest.tensors[1].layer && manifest.tensors[0].crc32 == 4294967295u,
         "tensors");
  EXPECT(manifest.requires_[0].version == "1.31.1" && bundle.file("g") == folder.path + "/g", "requires");
}

void TestChangedManifestsAreRefusedWithTheReason() {
  const Folder folder;
  const struct {
    const char *from, *to, *reason;
  } cases[] = {
      {"\"hidden_size\": 8", "\"hidden_size\": \"8\"",
       "model.hidden_size is \"8\" (a string), expected a whole number from 1 to 1048576: export"},
      {"\"hidden_size\": 8", "\"hidden_size\": 8.0", "model.hidden_size is 8.0, expected"},
      {"\"hidden_size\": 8", "\"hidden_size\": 99999999999999999999999", "model.hidden_size is 1e+23, expected"},
      {"\"num_layers\": 1", "\"num_layers\": 2", "model.num_layers is 2, and tensors belong to 1 layers"},
      {"\"num_heads\": 4", "\"num_heads\": 3", "no multiple of num_kv_heads, 2"},
      {"\"tied\": true", "\"tied\": true, \"num_experts\": 1, \"experts_per_token\": 2",
       "experts_per_token is 2, and num_experts 1"},
      {"\"tied\": true", "\"tied\": true, \"tied\": true", "the key \"tied\" is there twice"},
      {"\"tied\": true", "\"tied\": true, \"other\": 1", "model.other is an unknown field"},
      {", \"tied\": true", "", "model.tied is missing, expected true or false"},
      {"\"g\": {\"size\"", "\"../g\": {\"size\"", "names a file outside the bundle: \"../g\""},
      {"\"g\": {\"size\"", "\"/g\": {\"size\"", "names a file outside the bundle: \"/g\""},
      {"\"g\": {\"size\"", "\"h\": {\"size\"", "does not list \"g\""},
      {"\"size\": 1, \"sha256\": \"a\"", "\"size\": 2, \"sha256\": \"a\"", "has 1 bytes, the manifest says 2"},
      {"\"size\": 1, \"sha256\": \"a\"", "\"size\": -1, \"sha256\": \"a\"",
       "files.g.size is -1, expected a whole number of 0 or more"},
      {"\"offset\": 4", "\"offset\": 3", "the tensor \"b\" overlaps the one before it"},
      {"\"size\": 5", "\"size\": 6", "the tensor \"b\" ends at 10, and w at 9"},
      {"\"offset\": 4, \"size\": 5", "\"offset\": 9223372036854775807, \"size\": 9223372036854775807",
       "ends at 18446744073709551614"},
      {"\"layout\": \"array\"", "\"layout\": \"other\"",
       "tensors[0].contents.layout is \"other\" (a string), expected \"array\" or"},
      {"\"version\": \"1.31.1\"", "\"version\": \"new\"", "requires onnxruntime of a version that is none: \"new\""},
      {"[1, 5]", "[1, 4294967296]", "tokens.eos_ids[1] is 4294967296, expected"},
      {"\"format_version\": 1", "\"format_version\": 2", "format_version is 2, this EdgeLM reads 1: upgrade"},
      {"\"edgelm-bundle\"", "\"other\"", "is not the manifest of an EdgeLM bundle"},
      {"\"tensors\": [", "\"tensors\": [[", "not valid JSON"},
  };
  for (const auto& one : cases) {
    folder.write("manifest.json", replaced(kManifest, one.from, one.to));
    EXPECT(folder.refusal().find(one.reason) != std::string::npos, "%s: %s", one.to, folder.refusal().c_str());
  }
  folder.write("manifest.json", std::string((8 << 20) + 1, ' '));
  EXPECT(folder.refusal().find("too large") != std::string::npos, "%s", folder.refusal().c_str());
}

void TestWhatIsNoBundleIsNamed() {
  const Folder folder;
  edgelm_test::Remove(join(folder.path, "d"));
  EXPECT(folder.refusal().find(": d is missing; copy or export") != std::string::npos, "%s", folder.refusal().c_str());
  edgelm_test::Remove(join(folder.path, "manifest.json"));
  EXPECT(folder.refusal().find("it has no manifest.json") != std::string::npos, "%s", folder.refusal().c_str());
  for (const std::string path : {folder.path + "/none", std::string(), folder.path + "/g", std::string("a\0b", 3)}) {
    try {
      Bundle::open(path);
      EXPECT(false, "%s was opened", path.c_str());
    } catch (const Error& error) {
      EXPECT(std::string(error.what()).find("edgelm export") != std::string::npos, "%s", error.what());
    }
  }
}

void TestVersionsAreComparedByTheirLeadingNumbers() {
  EXPECT((version_numbers("1.31.1") == std::vector<int>{1, 31, 1}), "three");
  EXPECT((version_numbers("1.32.0.dev7") == std::vector<int>{1, 32, 0}), "of a developer");
  EXPECT((version_numbers("2") == std::vector<int>{2}) && (version_numbers("2.x") == std::vector<int>{2}), "one");
  EXPECT(version_numbers("x1").empty() && version_numbers("").empty(), "none");
}

}  // namespace

int main() {
  TestAGoodManifestIsReadWhole();
  TestChangedManifestsAreRefusedWithTheReason();
  TestWhatIsNoBundleIsNamed();
  TestVersionsAreComparedByTheirLeadingNumbers();
  return edgelm_test::Finish();
}
