// Tests the reading of parity packs: compressed data, archives, arrays, and that whatever is damaged is refused.
//
// With the argument "fuzz" and a number of seconds, it damages packs for that long.
#include "capi/parity/pack/pack.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>

#include "capi/common/files.h"
#include "capi/parity/pack/npz.h"
#include "check.h"
#include "system.h"

namespace {

using namespace edgelm::capi;
using Bytes = std::vector<unsigned char>;

Bytes from_hex(const char* text) {
  Bytes bytes;
  for (; *text; text += 2) bytes.push_back(static_cast<unsigned char>(std::stoi(std::string(text, 2), nullptr, 16)));
  return bytes;
}

// Made by zlib: a block with codes of its own, which refers back over hundreds of bytes, and one with the fixed codes.
const char* const kDynamic =
    "85d1510a83301004d0abcc114c341ae969022a04245b9240e9ed2bfec92ed3efe5b133cc99be7bc580b46d0da960af552ae440ee0df22948fd"
    "babea5e59ea5b417ce1b380a160d3c053e6a3152318f5a4c54b8a045e0358c543315c1100b175e8bc89b1b73ac5444e387e3937b67903fa33f"
    "c80f";
const char* const kFixed = "2bc94855284ecc4d55284167e88059a9792900";

std::string dynamic_text() {
  std::string text;
  for (int i = 0; i < 12; ++i) {
    text += "layer " + std::to_string(i) + " adds an error of its own at " + std::to_string(i * i * 7 % 97) +
            " positions; ";
  }
  return text;
}

std::string inflated(const Bytes& data, std::size_t limit) {
  const Bytes result = inflate(data.data(), data.size(), limit);
  return std::string(result.begin(), result.end());
}

// Why compressed data is refused; empty if it is not.
std::string inflate_refusal(const Bytes& data, std::size_t limit = 1000) {
  try {
    inflate(data.data(), data.size(), limit);
    return "";
  } catch (const Damaged& error) {
    return error.what();
  }
}

void TestCompressedDataIsRead() {
  EXPECT(inflated(from_hex(kDynamic), 600) == dynamic_text(), "own codes");
  EXPECT(inflated(from_hex(kFixed), 35) == "the same the same the same, the end", "fixed codes");
  EXPECT(inflated(from_hex("010300fcff616263"), 3) == "abc", "stored");
  EXPECT(inflated(from_hex("000300fcff616263010100feff64"), 4) == "abcd", "two blocks");
  EXPECT(inflated(from_hex("0300"), 0).empty(), "empty");
}

void TestDamagedCompressedDataIsRefused() {
  const Bytes data = from_hex(kDynamic);
  for (std::size_t size = 0; size < data.size(); ++size) {
    EXPECT(!inflate_refusal(Bytes(data.begin(), data.begin() + std::ptrdiff_t(size))).empty(), "%zu bytes", size);
  }
  for (std::size_t limit = 0; limit < 600; limit += 7) {
    EXPECT(inflate_refusal(data, limit) == "there is more data than expected", "limit %zu", limit);
  }
  EXPECT(inflate_refusal(from_hex("07")).find("unknown kind") != std::string::npos, "kind");
  EXPECT(inflate_refusal(from_hex("010300ffff616263")).find("wrong size") != std::string::npos, "stored");
  EXPECT(inflate_refusal(from_hex("0302")).find("before its start") != std::string::npos, "distance");
  // Every other byte in turn: never a crash, and never more than the limit.
  for (std::size_t at = 0; at < data.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      Bytes changed = data;
      changed[at] = static_cast<unsigned char>(changed[at] ^ (1 << bit));
      if (inflate_refusal(changed).empty()) EXPECT(inflated(changed, 1000).size() <= 1000, "byte %zu", at);
    }
  }
}

void append(std::string& text, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) text += char(value >> (8 * i));
}

struct ZipFile {
  std::string name, data;
  bool deflated = false;  // `data` is compressed
  std::string contents = {};

  const std::string& unpacked() const { return deflated ? contents : data; }
};

std::string zip(const std::vector<ZipFile>& files, const std::string& comment = "") {
  std::string text, directory;
  for (const ZipFile& file : files) {
    std::string fields;  // those that both headers have
    append(fields, 20, 2), append(fields, 0, 2), append(fields, file.deflated ? 8 : 0, 2), append(fields, 0, 4);
    append(fields, crc32(file.unpacked().data(), file.unpacked().size()), 4);
    append(fields, file.data.size(), 4), append(fields, file.unpacked().size(), 4), append(fields, file.name.size(), 2);
    directory += "PK\1\2";
    append(directory, 20, 2);
    directory += fields;
    directory += std::string(12, '\0');
    append(directory, text.size(), 4);
    directory += file.name;
    text += "PK\3\4" + fields;
    append(text, 0, 2);
    text += file.name + file.data;
  }
  const std::size_t start = text.size();
  text += directory + "PK\5\6";
  append(text, 0, 4), append(text, files.size(), 2), append(text, files.size(), 2);
  append(text, directory.size(), 4), append(text, start, 4), append(text, comment.size(), 2);
  return text + comment;
}

const unsigned char* bytes_of(const std::string& text) { return reinterpret_cast<const unsigned char*>(text.data()); }

std::string zip_read(const std::string& archive, const std::string& name, std::size_t limit = 1000) {
  try {
    const Bytes found = ZipArchive(bytes_of(archive), archive.size()).read(name, limit);
    return std::string(found.begin(), found.end());
  } catch (const Damaged& error) {
    return std::string("refused: ") + error.what();
  }
}

void TestArchivesAreRead() {
  const Bytes data = from_hex(kDynamic);
  const std::vector<ZipFile> files = {{"a", "one"}, {"b", std::string(data.begin(), data.end()), true, dynamic_text()}};
  for (const std::string& archive : {zip(files), zip(files, "a comment"), zip(files, std::string(65535, 'x'))}) {
    EXPECT(zip_read(archive, "a") == "one", "stored");
    EXPECT(zip_read(archive, "b") == dynamic_text(), "deflated");
  }
  const std::string archive = zip(files);
  EXPECT(zip_read(archive, "c") == "refused: a file is missing", "missing");
  EXPECT(zip_read(archive, "b", 599) == "refused: there is more data than expected", "limit");
  const auto changed = [&](std::size_t at, char value) {
    std::string other = archive;
    other[at] = value;
    return other;
  };
  const std::size_t entry = archive.find("PK\1\2");
  EXPECT(zip_read(changed(30 + 1, 'X'), "a") == "refused: its checksum is wrong", "contents");
  EXPECT(zip_read(changed(entry + 8, 1), "a") == "refused: it is encrypted", "encrypted");
  EXPECT(zip_read(changed(entry + 10, 12), "a") == "refused: it has compression of kind 12", "compression");
  EXPECT(zip_read(changed(entry + 42, 1), "a") == "refused: its directory is damaged", "offset");
  EXPECT(zip_read("PK", "a") == "refused: it is no zip file", "short");
  for (std::size_t size = 0; size < archive.size(); ++size) {
    EXPECT(zip_read(archive.substr(0, size), "a").rfind("refused", 0) == 0, "%zu bytes", size);
  }
}

std::string npy(const std::string& header, int version = 1) {
  std::string text = "\x93NUMPY";
  text += char(version);
  text += '\0';
  append(text, header.size(), version == 1 ? 2 : 4);
  return text + header;
}

std::string npy_shape(const std::string& header, int version = 1) {
  try {
    const std::string file = npy(header, version);
    const NpyHeader found = read_npy_header(bytes_of(file), file.size());
    std::string text = found.type + (found.by_columns ? " by columns" : "");
    for (const std::int64_t size : found.shape) text += " " + std::to_string(size);
    return text;
  } catch (const Damaged& error) {
    return error.what();
  }
}

void TestHeadersOfArraysAreRead() {
  const char* plain = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 64), }      \n";
  for (const int version : {1, 2, 3}) EXPECT(npy_shape(plain, version) == "<f4 3 64", "version %d", version);
  EXPECT(npy_shape("{\"shape\":(7,),'fortran_order':True,'descr':'<i4'}") == "<i4 by columns 7", "other order");
  EXPECT(npy_shape("{'descr': '<i4', 'fortran_order': False, 'shape': ()}") == "<i4", "no dimension");
  EXPECT(npy_shape(plain, 4) == "an array has format 4", "version");
  for (const char* header :
       {"", "{}", "{'descr': '<f4', 'fortran_order': False}", "{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,"}) {
    EXPECT(npy_shape(header) == "an array has a header that is none", "%s: %s", header, npy_shape(header).c_str());
  }
  EXPECT(npy_shape("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}") ==
             "an array is too large",
         "size");
  EXPECT(npy_shape(std::string(20000, ' '), 2) == "an array has a header that is too long", "length");
}

// A pack of two prompts of a model with 2 layers and 2 experts, with a rounded record; as Python writes it.
class PackFolder {
 public:
  PackFolder() {
    path = edgelm_test::MakeFolder();
    ints("ids", {5}, {1, 2, 3, 0, 4});
    ints("top_ids", {5, 2}, {0, 1, 2, 3, 4, 5, 1, 0, 3, 2});
    ints("probe_ids", {2}, {0, 5});
    for (const std::string prefix : {"reference", "quantized"}) {
      logits(prefix, 5);
      floats(prefix + ".gap", {5});
      floats(prefix + ".norms", {3, 5});
      floats(prefix + ".sketches", {3, 5, 64});
      floats(prefix + ".router", {2, 5, 2});
      ints(prefix + ".experts", {2, 5, 1}, {0, 1, 0, 1, 0, 1, 0, 1, 0, 1});
    }
    logits("rounded", 2);
    ints("rounded.rows", {2}, {0, 1});
    ints("rounded.flipped", {2}, {0, 1});
    write(index(), archive());
  }
  ~PackFolder() { edgelm_test::RemoveFolder(path); }

  std::string index() const {
    return R"({"format_version": 1, "prompts": [
      {"name": "a", "text": "x", "decoded": "x", "start": 0, "length": 2, "greedy": [3, 4]},
      {"name": "b", "text": "y", "decoded": "y", "start": 3, "length": 2, "greedy": []}],
      "tokenizer": {"vocab_size": 6, "sha256": "00"}, "sketch": {"seed": 7, "width": 64}, "arrays": {)" +
           listed_ + R"(}, "made_with": {"edgelm": "0.2.0", "torch": "2"}, "rounded": {"kv": "float16"}})";
  }
  std::string archive() const { return zip(files_); }
  const std::vector<ZipFile>& files() const { return files_; }
  void write(const std::string& json, const std::string& npz) const {
    for (const auto& [name, text] : {std::pair("pack.json", &json), std::pair("pack.npz", &npz)}) {
      std::FILE* file = std::fopen(join(path, name).c_str(), "wb");
      std::fwrite(text->data(), 1, text->size(), file);
      std::fclose(file);
    }
  }
  // Why the pack is refused; empty if it is not.
  std::string refusal() const {
    try {
      ParityPack::load(path);
      return "";
    } catch (const Error& error) {
      return error.code == EDGELM_BUNDLE ? error.what() : "wrong code";
    }
  }
  std::string refusal_of(const std::string& from, const std::string& to) const {
    std::string json = index();
    json.replace(json.find(from), from.size(), to);
    write(json, archive());
    return refusal();
  }

  std::string path;

 private:
  void add(const std::string& name, const std::vector<int>& shape, const char* type, const char* listed,
           const std::string& data) {
    std::string sizes, all;
    for (const int size : shape)
      sizes += std::to_string(size) + ",", all += (all.empty() ? "" : ", ") + std::to_string(size);
    files_.push_back(
        {name + ".npy",
         npy(std::string("{'descr': '") + type + "', 'fortran_order': False, 'shape': (" + sizes + "), }\n") + data});
    listed_ += (listed_.empty() ? "\"" : ", \"") + name + "\": {\"shape\": [" + all + "], \"dtype\": \"" + listed +
               "\"}";
  }
  void ints(const std::string& name, const std::vector<int>& shape, const std::vector<std::int32_t>& values) {
    add(name, shape, "<i4", "int32", std::string(reinterpret_cast<const char*>(values.data()), 4 * values.size()));
  }
  void floats(const std::string& name, const std::vector<int>& shape) {
    std::size_t count = 1;
    for (const int size : shape) count *= std::size_t(size);
    std::vector<float> values(count);
    for (std::size_t i = 0; i < count; ++i) values[i] = float(i) / 8;
    add(name, shape, "<f4", "float32", std::string(reinterpret_cast<const char*>(values.data()), 4 * count));
  }
  void logits(const std::string& prefix, int rows) {
    floats(prefix + ".top_logits", {rows, 2});
    floats(prefix + ".logsumexp", {rows});
    floats(prefix + ".probe_logits", {rows, 2});
    floats(prefix + ".next_logit", {rows});
    ints(prefix + ".best", {rows}, std::vector<std::int32_t>(std::size_t(rows), 1));
  }

  std::vector<ZipFile> files_;
  std::string listed_;
};

void TestAPackIsRead() {
  const PackFolder folder;
  EXPECT(folder.refusal().empty(), "%s", folder.refusal().c_str());
  const ParityPack pack = ParityPack::load(folder.path);
  EXPECT(pack.num_layers == 2 && pack.num_experts == 2 && pack.top == 2 && pack.probes() == 2, "sizes");
  EXPECT(pack.next_ids() == std::vector<std::int32_t>({2, 3, 0, 4, 0}), "next ids");
  EXPECT(pack.has_next() == std::vector<bool>({true, false, false, true, false}), "has next");
  EXPECT(pack.target().sketches[65] == 65 / 8.f && pack.target().chosen == 1, "values");
  EXPECT(pack.rounded->flipped == std::vector<bool>({false, true}) && pack.rounded->kv == "float16", "rounded");
  EXPECT(pack.made_with.size() == 2 && pack.made_with[1].first == "torch", "made with");
}

void TestAPackThatDoesNotFitIsRefused() {
  const PackFolder folder;
  const struct {
    const char *from, *to, *said;
  } cases[] = {
      {"\"format_version\": 1", "\"format_version\": 2", "use a newer EdgeLM"},
      {"\"length\": 2", "\"length\": 3", "do not add up"},
      {"\"start\": 3", "\"start\": 2", "prompt \"b\" is misplaced"},
      {"\"length\": 2", "\"length\": 0", "expected a whole number from 1"},
      {"[3, 4]", "[3, -4]", "prompts[0].greedy[1] is -4"},
      {"\"width\": 64", "\"width\": 32", "sketch.width is 32"},
      {"float16", "float8", "rounded.kv is \"float8\""},
      {"\"ids\": {\"shape\": [5]", "\"ids\": {\"shape\": [4]", "array 'ids' is not what pack.json says"},
      {"\"ids\": {\"shape\": [5]", "\"ids\": {\"shape\": [2000000000, 2000000000, 9]", "too many for its size"},
      {"\"ids\": {\"shape\": [5], \"dtype\": \"int32\"", "\"ids\": {\"shape\": [5], \"dtype\": \"int64\"",
       "array 'ids'"},
      {"\"ids\": {", "\"others\": {", "has no array others"},
      {", \"quantized.experts\": {\"shape\": [2, 5, 1], \"dtype\": \"int32\"}", "", "one of router and experts"},
      {", \"quantized.gap\": {\"shape\": [5], \"dtype\": \"float32\"}", "", "arrays.quantized.gap is missing"},
      {"\"sketch\":", "\"more\": 1, \"sketch\":", "unknown field"},
  };
  for (const auto& [from, to, said] : cases) {
    const std::string refusal = folder.refusal_of(from, to);
    EXPECT(refusal.find(said) != std::string::npos, "%s: %s", to, refusal.c_str());
    EXPECT(refusal.find(folder.path) == 0, "%s", refusal.c_str());
  }
  folder.write(folder.index(), folder.archive());
  edgelm_test::Remove(join(folder.path, "pack.npz"));
  EXPECT(folder.refusal().find("pack.npz: is missing") != std::string::npos, "%s", folder.refusal().c_str());
  edgelm_test::Remove(join(folder.path, "pack.json"));
  EXPECT(folder.refusal().find("the bundle has no parity pack") != std::string::npos, "%s", folder.refusal().c_str());
}

// Change, remove, repeat or insert some bytes.
std::string damaged(std::string text, std::mt19937& random) {
  const auto below = [&](std::size_t limit) { return std::size_t(random()) % limit; };
  for (std::size_t times = 1 + below(4); times-- && !text.empty();) {
    const std::size_t at = below(text.size()), size = 1 + below(std::min<std::size_t>(8, text.size() - at));
    switch (below(5)) {
      case 0: text[at] = char(random()); break;
      case 1: text[at] = char(text[at] ^ (1 << below(8))); break;
      case 2: text.erase(at, size); break;
      case 3: text.insert(at, text.substr(at, size)); break;
      default: text.replace(at, size, std::string(size, below(2) ? '\xff' : '9'));
    }
  }
  return text;
}

// Damage the index, the archive, or one array of an otherwise sound archive, in turn.
void TestDamagedPacksNeverCrash(double seconds) {
  const PackFolder folder;
  const std::string json = folder.index(), npz = folder.archive();
  std::mt19937 random(16);
  const auto start = std::chrono::steady_clock::now();
  int tried = 0, refused = 0;
  for (; tried < 300 || std::chrono::steady_clock::now() - start < std::chrono::duration<double>(seconds); ++tried) {
    std::string index = json, archive = npz;
    if (tried % 3 == 0) {
      index = damaged(json, random);
    } else if (tried % 3 == 1) {
      archive = damaged(npz, random);
    } else {
      std::vector<ZipFile> files = folder.files();
      ZipFile& file = files[random() % files.size()];
      // Half of the time within the header, which is parsed.
      const std::size_t size = random() % 2 ? file.data.find('\n') : file.data.size();
      file.data = damaged(file.data.substr(0, size), random) + file.data.substr(size);
      archive = zip(files);
    }
    folder.write(index, archive);
    const std::string refusal = folder.refusal();
    EXPECT(refusal != "wrong code", "pack %d", tried);
    refused += !refusal.empty();
  }
  EXPECT(refused > tried / 2, "%d of %d", refused, tried);
  std::printf("%d damaged packs, %d refused\n", tried, refused);
}

}  // namespace

int main(int count, char** arguments) {
  TestCompressedDataIsRead();
  TestDamagedCompressedDataIsRefused();
  TestArchivesAreRead();
  TestHeadersOfArraysAreRead();
  TestAPackIsRead();
  TestAPackThatDoesNotFitIsRefused();
  TestDamagedPacksNeverCrash(count == 3 && std::strcmp(arguments[1], "fuzz") == 0 ? std::atof(arguments[2]) : 0);
  return edgelm_test::Finish();
}
