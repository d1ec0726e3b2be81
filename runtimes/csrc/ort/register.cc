// Registers the operators of a session, with the kernels of this CPU.
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/cpu.h"
#include "op.h"

namespace edgelm::ort {
namespace {

// Chosen again at each registration, so that EDGELM_ISA takes effect whenever it is set, and registration fails if it
// cannot. All sessions of the process use the new choice: every table gives the same bits.
std::atomic<const Kernels*> chosen{nullptr};

// The operators' domain. It is created once for each runtime in the process (there may be two: ONNX Runtime GenAI
// brings its own) and shared by its sessions. The runtime keeps pointers to it, and unloads this library after its last
// session.
struct Domain {
  const OrtApi* api;
  OrtCustomOpDomain* domain;

  explicit Domain(const OrtApi* of) : api(of), domain(nullptr) {
    Check(api, CreateCustomOpDomain(api, "edgelm", &domain));
    for (const OrtCustomOp* op :
         {QuantEmbeddingOp(), QuantLinearOp(), SparseMoeOp(), GroupQueryAttentionOp(), RmsNormOp()}) {
      Check(api, CustomOpDomainAdd(api, domain, op));
    }
  }
  Domain(const Domain&) = delete;
  Domain& operator=(const Domain&) = delete;
  ~Domain() {
    if (domain != nullptr) ReleaseCustomOpDomain(api, domain);
  }
};

std::mutex mutex;
std::vector<std::unique_ptr<Domain>> domains;

void Register(OrtSessionOptions* options, const OrtApi* api) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::string why;
  const Kernels* kernels = ChooseKernels(&why);
  if (kernels == nullptr) Fail(why);
  chosen = kernels;
  const Domain* found = nullptr;
  for (const auto& domain : domains) {
    if (domain->api == api) found = domain.get();
  }
  if (found == nullptr) {
    domains.push_back(std::make_unique<Domain>(api));
    found = domains.back().get();
  }
  Check(api, AddCustomOpDomain(api, options, found->domain));
}

}  // namespace

const Kernels& ChosenKernels() { return *chosen; }

OrtStatus* RegisterOperators(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {  // an older runtime; CreateStatus is the first entry of every version
    return CreateStatus(base->GetApi(1), kFail,
                        "EdgeLM's operators need ONNX Runtime 1.17 or newer: install onnxruntime>=1.31.1");
  }
  return Guarded(api, "EdgeLM's operators", "", [&] { Register(options, api); });
}

}  // namespace edgelm::ort
