// A library that says it is ONNX Runtime 1.16.0, for the test of what is too old.
#include "ort/host_abi.h"

namespace {

const OrtApi* GetApi(uint32_t) { return nullptr; }
const char* GetVersionString() { return "1.16.0"; }
const OrtApiBase base = {GetApi, GetVersionString};

}  // namespace

extern "C" __attribute__((visibility("default"))) const OrtApiBase* OrtGetApiBase() { return &base; }
