// Checks of a whole JSON document before it is read: types and ranges are exact, and an unknown field is refused, since it
// may change the meaning of the others. As edgelm/json_dataclass.py.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "capi/common/json.h"

namespace edgelm::capi {

// What a value must be. Checks are built from each other: list_of(whole(0, 9)).
class Schema {
 public:
  // Where a value is in the document: a key, or else an index.
  struct Place {
    const Place* outer;
    std::string_view key;
    std::size_t index;
  };
  // Throws with the value's place and what is wrong.
  using Check = std::function<void(const Json& value, const Place& place)>;

  Schema(std::string kind, Check check) : kind_(std::move(kind)), check_(std::move(check)) {}

  // Throws Error(code) "WHERE: model.num_layers is "12" (a string), expected a whole number from 1 to 4096: ADVICE".
  void require(const Json& document, const std::string& where, const std::string& advice, edgelm_code code) const;

  void check(const Json& value, const Place& place) const { check_(value, place); }
  const std::string& kind() const { return kind_; }

 private:
  std::string kind_;
  Check check_;
};

struct Field {
  std::string name;
  Schema schema;
  bool required = true;
};

Schema whole(std::int64_t least, std::int64_t most = INT64_MAX);
Schema text();
Schema true_or_false();
Schema one_of(std::vector<std::string> choices);
Schema nullable(Schema inner);
Schema list_of(Schema inner);
Schema map_of(Schema inner);
Schema object_of(std::vector<Field> fields);

}  // namespace edgelm::capi
