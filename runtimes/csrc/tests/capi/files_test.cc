// Tests files, hashes and UTF-8.
#include "capi/common/files.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>

#if defined(_WIN32)
#include "system/windows_text.h"
#else
#include <sys/stat.h>
#include <unistd.h>
#endif

#include "capi/common/sha256_blocks.h"
#include "capi/common/unicode.h"
#include "check.h"
#include "system.h"

namespace {

using namespace edgelm::capi;

std::string folder() {
  static const std::string path = edgelm_test::MakeFolder();
  return path;
}

template <class Call>
std::string refusal(edgelm_code code, const Call& call) {
  try {
    call();
    return "";
  } catch (const Error& error) {
    return error.code == code ? error.what() : "wrong code";
  }
}

void write(const std::string& path, const std::string& text) {
  write_atomically(path, [&](const auto& put) { put(text.data(), text.size()); });
}

void TestAFileIsReplacedWholeOrNotAtAll() {
  const std::string path = join(folder(), "a");
  const std::string large(1 << 20, 'x');
  write(path, large);
  EXPECT(read_file(path, 1 << 20, EDGELM_FILE) == large, "written and read");
  const std::string why = refusal(EDGELM_CANCELLED, [&] {
    write_atomically(path, [](const auto& put) {
      put("half", 4);
      fail(EDGELM_CANCELLED, "stop");
    });
  });
  EXPECT(why == "stop" && read_file(path, 1 << 20, EDGELM_FILE) == large, "unchanged after an error");
  EXPECT(
      refusal(EDGELM_FILE, [&] { write(join(folder(), "none/a"), ""); }).find("cannot be written") != std::string::npos,
      "no folder");
  EXPECT(edgelm_test::Remove(path) && edgelm_test::Remove(folder()), "something was left beside the file");
  EXPECT(std::filesystem::create_directory(folder()), "made again");
}

void TestWhatIsNoReadableFileIsRefused() {
  const std::string path = join(folder(), "b");
  write(path, "12345");
  EXPECT(refusal(EDGELM_BUNDLE, [&] { read_file(path, 4, EDGELM_BUNDLE); }).find("larger than 4") != std::string::npos,
         "large");
  EXPECT(read_file(path, 5, EDGELM_BUNDLE) == "12345", "just as large as allowed");
  EXPECT(refusal(EDGELM_FILE, [&] { read_file(folder(), 9, EDGELM_FILE); }).find("folder") != std::string::npos,
         "folder");
  EXPECT(refusal(EDGELM_FILE, [&] { read_file(path + "x", 9, EDGELM_FILE); }).find("missing") != std::string::npos,
         "none");
#if defined(_WIN32)
  const std::string pipe = "NUL";
#else
  const std::string pipe = join(folder(), "pipe");
  EXPECT(mkfifo(pipe.c_str(), 0600) == 0, "mkfifo");
#endif
  EXPECT(refusal(EDGELM_FILE, [&] { read_file(pipe, 9, EDGELM_FILE); }).find("not a file") != std::string::npos,
         "pipe");

  {
    const MappedFile mapped(path, EDGELM_BUNDLE);
    EXPECT(mapped.size() == 5 && mapped.data()[4] == '5', "mapped");
    mapped.check();
#if defined(_WIN32)  // there nobody can replace or shorten a file that is mapped
    EXPECT(refusal(EDGELM_FILE, [&] { write(path, ""); }).find("cannot be written") != std::string::npos, "replaced");
#else
    write(path, "");
#endif
    mapped.check();  // the mapping is of the file that was there first
  }
  write(path, "");
  EXPECT(MappedFile(path, EDGELM_BUNDLE).size() == 0, "an empty file");
  write(path, "12345");
#if !defined(_WIN32)
  const MappedFile cut(path, EDGELM_BUNDLE);
  std::filesystem::resize_file(path, 3);
  EXPECT(refusal(EDGELM_BUNDLE, [&] { cut.check(); }).find("had 5 bytes") != std::string::npos, "cut");
#endif
  edgelm_test::RemoveFolder(folder());
}

void make_folder(const std::string& path) {
#if defined(_WIN32)
  CreateDirectoryW(edgelm::system::windows_path(path).c_str(), nullptr);
#else
  mkdir(path.c_str(), 0700);
#endif
}

bool remove_folder(const std::string& path) {
#if defined(_WIN32)
  return RemoveDirectoryW(edgelm::system::windows_path(path).c_str());
#else
  return rmdir(path.c_str()) == 0;
#endif
}

void TestNamesMayHaveAnyCharacterAndLength() {
  make_folder(folder());
  std::string deep = join(folder(), "with space, \u00e4 and \u6f22");
  make_folder(deep);
  while (deep.size() < 400) make_folder(deep += "/" + std::string(60, 'n'));
  const std::string path = join(deep, "\u00e4\u6f22");
  write(path, "12345");
  write(path, "54321");
  EXPECT(is_folder(deep) && is_file(path) && file_size(path, EDGELM_FILE) == 5, "status");
  EXPECT(read_file(path, 5, EDGELM_FILE) == "54321", "read");
  EXPECT(MappedFile(path, EDGELM_FILE).data()[0] == '5', "mapped");
  EXPECT(parent(resolved(path)) == resolved(deep), "%s", resolved(path).c_str());
  EXPECT(resolved(path).find("\u00e4\u6f22") != std::string::npos, "%s", resolved(path).c_str());
  EXPECT(edgelm::system::open_stream(path) != nullptr, "a stream");
  while (deep.size() > folder().size()) {
    edgelm::system::remove_file(join(deep, "\u00e4\u6f22"));
    EXPECT(remove_folder(deep), "%s is not empty", deep.c_str());
    deep = parent(deep);
  }
}

void TestHashesAreTheStandardOnes() {
  const std::string empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
  EXPECT(Sha256().hex() == empty, "of nothing");
  for (const std::size_t step : {1, 7, 64, 1000}) {
    Sha256 hash;
    std::uint32_t crc = 0;
    const std::string text(1000, 'a');
    for (std::size_t at = 0; at < text.size(); at += step) {
      const std::string_view part = std::string_view(text).substr(at, step);
      hash.update(part);
      crc = crc32(part.data(), part.size(), crc);
    }
    EXPECT(hash.hex() == "41edece42d63e8d9bf515a9ba6932e1c20cbc9f5a5d134645adb5db1b9737ea3", "in steps of %zu", step);
    EXPECT(crc == 0x9a38da03u, "%08x in steps of %zu", crc, step);
  }
  EXPECT(crc32("123456789", 9) == 0xcbf43926u, "check value");
}

// The text of bytes that arrive one by one.
std::string streamed(std::string_view bytes) {
  Utf8Stream stream;
  std::string text;
  for (const char byte : bytes) text += stream.push({&byte, 1});
  return text + stream.flush();
}

void TestTheCpusInstructionsHashAsScalarCodeDoes() {
  unsigned char data[64 * 9];
  for (std::size_t i = 0; i < sizeof(data); ++i) data[i] = static_cast<unsigned char>(i * 37 + i / 64);
  for (std::size_t count = 0; count <= 9; ++count) {
    std::uint32_t fast[8], scalar[8];
    for (std::uint32_t i = 0; i < 8; ++i) fast[i] = scalar[i] = 0x9e3779b9u * (i + 1);
    sha256_blocks(fast, data, count);
    sha256_blocks_scalar(scalar, data, count);
    EXPECT(std::equal(fast, fast + 8, scalar), "%zu blocks", count);
  }
}

void TestInvalidUtf8BecomesReplacementCharacters() {
  const std::string r = "\xef\xbf\xbd";
  const std::pair<std::string, std::string> cases[] = {
      {"aé漢😀", "aé漢😀"},
      {"\xff\xc0\x80", r + r + r},
      {"\xe6\xbc", r},
      {"\xe6\xbc!", r + "!"},
      {"\xed\xa0\x80", r + r + r},          // a surrogate
      {"\xf0\x80\x80\x80", r + r + r + r},  // overlong
      {"\xf4\x90\x80\x80", r + r + r + r},  // beyond U+10FFFF
      {"\xf0\x9f\x98\xf0\x9f\x98\x80", r + "😀"},
  };
  for (const auto& [bytes, text] : cases) {
    Utf8Stream stream;
    const std::string whole = stream.push(bytes);
    EXPECT(whole + stream.flush() == text, "of %zu bytes at once", bytes.size());
    EXPECT(streamed(bytes) == text, "of %zu bytes one by one", bytes.size());
    EXPECT((valid_utf8_prefix(bytes) == bytes.size()) == (bytes == text), "validity of %zu bytes", bytes.size());
  }
  Utf8Stream stream;
  EXPECT(stream.push("a\xf0\x9f") == "a" && stream.push("\x98") == "" && stream.push("\x80") == "😀", "held back");
}

void TestCharactersAreTheSameThereAndBack() {
  std::u32string all;
  for (char32_t c = 0; c < 0x110000; c += c < 0x3000 ? 1 : 17) {
    if (c < 0xd800 || c > 0xdfff) all += c;
  }
  const std::string text = to_utf8(all);
  EXPECT(valid_utf8_prefix(text) == text.size() && to_characters(text) == all, "of %zu characters", all.size());
}

}  // namespace

int main() {
  TestAFileIsReplacedWholeOrNotAtAll();
  TestWhatIsNoReadableFileIsRefused();
  TestNamesMayHaveAnyCharacterAndLength();
  TestHashesAreTheStandardOnes();
  TestTheCpusInstructionsHashAsScalarCodeDoes();
  TestInvalidUtf8BecomesReplacementCharacters();
  TestCharactersAreTheSameThereAndBack();
  return edgelm_test::Finish();
}
