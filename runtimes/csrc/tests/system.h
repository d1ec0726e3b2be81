// What tests need of the operating system: folders of their own, and environment variables.
#ifndef EDGELM_TESTS_SYSTEM_H_
#define EDGELM_TESTS_SYSTEM_H_

#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>

namespace edgelm_test {

// A new folder in the system's folder for temporary files; the caller removes it.
inline std::string MakeFolder() {
  std::random_device random;
  const auto name = "edgelm-test-" + std::to_string(random()) + std::to_string(random());
  const std::filesystem::path path = std::filesystem::temp_directory_path() / name;
  std::filesystem::create_directory(path);
  return path.generic_string();
}

// Remove a file or an empty folder; whether it worked.
inline bool Remove(const std::string& path) {
  std::error_code error;
  return std::filesystem::remove(path, error);
}

// Remove a folder and what is in it.
inline void RemoveFolder(const std::string& path) {
  std::error_code error;
  std::filesystem::remove_all(path, error);
}

// Set an environment variable; nullptr removes it.
inline void SetVariable(const char* name, const char* value) {
#if defined(_WIN32)
  _putenv_s(name, value == nullptr ? "" : value);
#else
  value == nullptr ? unsetenv(name) : setenv(name, value, 1);
#endif
}

}  // namespace edgelm_test

#endif  // EDGELM_TESTS_SYSTEM_H_
