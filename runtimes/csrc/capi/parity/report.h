// The JSON document of `edgelm parity --json`. As ParityReport of edgelm/parity/result.py.
#pragma once

#include "capi/parity/device/device_run.h"
#include "capi/tokenizer/tokenizer.h"

namespace edgelm::capi {

// What the document tells of.
struct Findings {
  const Bundle& bundle;
  const ParityPack& pack;
  const DeviceRun& run;
  const Limits& limits;
  const Tokenizer* tokenizer;  // nullptr if it cannot be loaded
  std::string kind;
  std::vector<Check> checks;
  std::optional<Diagnosis> diagnosis;
  FloatLoss loss;
  std::vector<std::string> notes;
};

bool passed(const std::vector<Check>& checks);

Json report(const Findings& findings);

}  // namespace edgelm::capi
