// ONNX Runtime's library, opened at run time, and owners of its objects.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "capi/bundle/bundle.h"
#include "ort/host_abi.h"

namespace edgelm::capi {

// An opened library. It stays open until the process ends, since it may have started threads.
struct OrtLibrary {
  std::string path, version;
  const OrtApiBase* base;
  const OrtApi* api;

  // Throw Error(code) with the message of a failed call; the status is released.
  void require(OrtStatus* status, edgelm_code code = EDGELM_RUNTIME) const;
  // The first line of a status's message, which is released; empty for success.
  std::string problem(OrtStatus* status) const;
};

// Open the library that `path` names; if it is empty that of EDGELM_ONNXRUNTIME, else one beside this library, else one
// that the system finds. All callers share it. Throws Error(EDGELM_UNAVAILABLE).
const OrtLibrary& open_onnxruntime(const std::string& path);

// Throws Error(EDGELM_UNAVAILABLE) if the library is older than the bundle needs.
void check_version(const OrtLibrary& library, const Bundle& bundle);

// An object of the library's; Release is the type of the entry that releases it.
template <typename Object, typename Release>
class OrtOwned {
 public:
  explicit OrtOwned(const OrtLibrary& library) : library_(&library) {}
  OrtOwned(OrtOwned&& other) noexcept : library_(other.library_), object_(other.object_) { other.object_ = nullptr; }
  OrtOwned& operator=(OrtOwned&& other) noexcept {
    std::swap(library_, other.library_);
    std::swap(object_, other.object_);
    return *this;
  }
  ~OrtOwned() { reset(); }

  Object* get() const { return object_; }
  // Where a function is to write the object.
  Object** out() {
    reset();
    return &object_;
  }
  void reset() {
    if (object_ != nullptr) Release{}(library_->api, object_);
    object_ = nullptr;
  }

 private:
  const OrtLibrary* library_;
  Object* object_ = nullptr;
};

using OwnedEnv = OrtOwned<OrtEnv, decltype(ort::ReleaseEnv)>;
using OwnedSession = OrtOwned<OrtSession, decltype(ort::ReleaseSession)>;
using OwnedSessionOptions = OrtOwned<OrtSessionOptions, decltype(ort::ReleaseSessionOptions)>;
using OwnedRunOptions = OrtOwned<OrtRunOptions, decltype(ort::ReleaseRunOptions)>;
using OwnedBinding = OrtOwned<OrtIoBinding, decltype(ort::ReleaseIoBinding)>;
using OwnedMemoryInfo = OrtOwned<OrtMemoryInfo, decltype(ort::ReleaseMemoryInfo)>;
using OwnedValue = OrtOwned<OrtValue, decltype(ort::ReleaseValue)>;
using OwnedTypeInfo = OrtOwned<OrtTypeInfo, decltype(ort::ReleaseTypeInfo)>;
using OwnedShape = OrtOwned<OrtTensorTypeAndShapeInfo, decltype(ort::ReleaseTensorTypeAndShapeInfo)>;

}  // namespace edgelm::capi
