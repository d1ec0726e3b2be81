// Tests the choice of the instruction set by EDGELM_ISA, and the error with the valid names for a bad value.
#include "kernels/cpu.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "check.h"
#include "system.h"

namespace {

using edgelm::ChooseKernels;
using edgelm::InstructionSets;
using edgelm::Kernels;

void TestTheBestAvailableIsChosen() {
  std::string why;
  for (const char* nothing : {static_cast<const char*>(nullptr), ""}) {
    edgelm_test::SetVariable("EDGELM_ISA", nothing);
    const Kernels* chosen = ChooseKernels(&why);
    bool better = true;
    for (const edgelm::InstructionSet& set : InstructionSets()) {
      if (set.kernels == chosen) better = false;
      EXPECT(!better || !set.available(), "%s is better than %s", set.kernels->name, chosen->name);
    }
    EXPECT(!better && why.find("best") != std::string::npos, "%s", why.c_str());
  }
  EXPECT(InstructionSets().back().kernels == &edgelm::kScalarKernels, "scalar is the last resort");
  EXPECT(InstructionSets().back().available(), "scalar runs everywhere");
}

void TestEachCanBeForcedWhereItRuns() {
  for (const edgelm::InstructionSet& set : InstructionSets()) {
    std::string why;
    edgelm_test::SetVariable("EDGELM_ISA", set.kernels->name);
    const Kernels* chosen = ChooseKernels(&why);
    if (set.available()) {
      EXPECT(chosen == set.kernels && why.find("EDGELM_ISA") == 0, "%s: %s", set.kernels->name, why.c_str());
    } else {
      EXPECT(chosen == nullptr && why.find(set.missing) != std::string::npos, "%s: %s", set.kernels->name, why.c_str());
      EXPECT(why.find("scalar") != std::string::npos, "no valid name in: %s", why.c_str());
    }
  }
}

void TestAnUnknownNameIsAnErrorWithTheValidOnes() {
  std::string why;
  for (const char* name : {"sse9", "AVX2", "scalar ", "avx"}) {
    edgelm_test::SetVariable("EDGELM_ISA", name);
    EXPECT(ChooseKernels(&why) == nullptr, "%s was taken", name);
    EXPECT(why.find(std::string("EDGELM_ISA=") + name) == 0, "%s", why.c_str());
    for (const edgelm::InstructionSet& set : InstructionSets()) {
      const bool listed = (why + ",").find(" " + std::string(set.kernels->name) + ",") != std::string::npos;
      EXPECT(listed == set.available(), "%s in: %s", set.kernels->name, why.c_str());
    }
  }
}

void TestTheCInterfaceSaysTheSame() {
  EXPECT(edgelm_isa_count() == static_cast<int32_t>(InstructionSets().size()), "%d", edgelm_isa_count());
  for (int32_t i = 0; i < edgelm_isa_count(); ++i) {
    const edgelm::InstructionSet& set = InstructionSets()[static_cast<size_t>(i)];
    EXPECT(std::strcmp(edgelm_isa_name(i), set.kernels->name) == 0, "%s", edgelm_isa_name(i));
    EXPECT((edgelm_isa_missing(i) == nullptr) == set.available(), "%s", edgelm_isa_name(i));
  }
  EXPECT(edgelm_isa_name(-1) == nullptr && edgelm_isa_name(99) == nullptr, "no such index");
  EXPECT(edgelm_isa_missing(99) != nullptr, "no such index");
  char why[200];
  edgelm_test::SetVariable("EDGELM_ISA", "scalar");
  EXPECT(edgelm_isa_chosen(why, sizeof why) == edgelm_isa_count() - 1, "%s", why);
  edgelm_test::SetVariable("EDGELM_ISA", "none");
  EXPECT(edgelm_isa_chosen(why, sizeof why) == -1 && std::strstr(why, "EDGELM_ISA=none") == why, "%s", why);
  EXPECT(edgelm_isa_chosen(why, 8) == -1 && std::strlen(why) == 7, "cut off at %d", int(std::strlen(why)));
}

}  // namespace

int main() {
  TestTheBestAvailableIsChosen();
  TestEachCanBeForcedWhereItRuns();
  TestAnUnknownNameIsAnErrorWithTheValidOnes();
  TestTheCInterfaceSaysTheSame();
  return edgelm_test::Finish();
}
