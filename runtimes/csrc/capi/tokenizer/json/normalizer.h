// The steps of "normalizer" in tokenizer.edgelm.json.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "capi/common/json.h"

namespace edgelm::capi {

class Normalizer {
 public:
  // "normalizer" of `settings`. Throws Error(EDGELM_TOKENIZER) that names a step or pattern that is not supported.
  explicit Normalizer(const Members& settings);
  ~Normalizer();
  Normalizer(Normalizer&&) noexcept;

  bool empty() const { return steps_.empty(); }
  std::string operator()(std::string_view text) const;

 private:
  struct Step;
  std::vector<std::unique_ptr<const Step>> steps_;
};

}  // namespace edgelm::capi
