// Named values, as a request from Python or a serialised plugin gives them: lines of `name=value`.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "cuda/host/launch.h"

namespace edgelm::gpu {

class Fields {
 public:
  Fields() = default;
  // Parse lines of `name=value`; a value may contain `=`, but no line end. Throws Error if a line has no `=`.
  explicit Fields(std::string_view text);

  bool has(const std::string& name) const { return values_.count(name) != 0; }
  // The value; throws Error if it is missing, or is not a number of the range.
  const std::string& text(const std::string& name) const;
  i64 integer(const std::string& name) const;
  i64 size(const std::string& name) const;     // 0 to 2^31 - 1: fits the i32 of a kernel's arguments
  u64 address(const std::string& name) const;  // 0 if missing
  double number(const std::string& name) const;
  // The same with a value for a missing one.
  std::string text(const std::string& name, const std::string& otherwise) const;
  i64 integer(const std::string& name, i64 otherwise) const;
  double number(const std::string& name, double otherwise) const;
  bool flag(const std::string& name) const { return integer(name, 0) != 0; }

  const std::map<std::string, std::string>& all() const { return values_; }

 private:
  std::map<std::string, std::string> values_;
};

}  // namespace edgelm::gpu
