// Declarations of the part of ONNX Runtime's C ABI that the operators use, written from its documentation, since the
// runtime's packages contain no C headers.
//
// A library of operators exports RegisterCustomOps, which receives an OrtApiBase; its GetApi returns a table of
// function pointers. Entries of the table are only appended, never moved or changed: entry 90 is KernelContext_GetInput
// in every release. So each entry that is used is declared once below, with its number and signature. The newest of
// them came with version 17 of the API (ONNX Runtime 1.17): that version is requested, and an older runtime is refused
// with a message. In the other direction the runtime reads our OrtCustomOp, whose fields are stable in the same way;
// `version` 17 tells it which fields exist.
#ifndef EDGELM_ORT_ABI_H_
#define EDGELM_ORT_ABI_H_

#include <cstddef>
#include <cstdint>

extern "C" {

// Opaque types, used only through pointers.
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

struct OrtApi {
  void (*entries[1])();  // in fact as many as the version has
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, void* context);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};

}  // extern "C"

namespace edgelm::ort {

constexpr uint32_t kApiVersion = 17;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt64 = 7 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

// One entry of the table: its number and its type.
template <size_t kNumber, typename Function>
struct Entry;

template <size_t kNumber, typename Result, typename... Arguments>
struct Entry<kNumber, Result(Arguments...)> {
  Result operator()(const OrtApi* api, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(api->entries[kNumber])(arguments...);
  }
};

constexpr Entry<0, OrtStatus*(int code, const char* message)> CreateStatus{};
constexpr Entry<2, const char*(const OrtStatus*)> GetErrorMessage{};
constexpr Entry<26, OrtStatus*(const char* name, OrtCustomOpDomain**)> CreateCustomOpDomain{};
constexpr Entry<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)> CustomOpDomainAdd{};
constexpr Entry<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> AddCustomOpDomain{};
constexpr Entry<51, OrtStatus*(OrtValue*, void** data)> GetTensorMutableData{};
constexpr Entry<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t* count)> GetDimensionsCount{};
constexpr Entry<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t count)> GetDimensions{};
constexpr Entry<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)> GetTensorTypeAndShape{};
constexpr Entry<85, OrtStatus*(const OrtKernelInfo*, const char* name, float*)> GetAttributeFloat{};
constexpr Entry<86, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t*)> GetAttributeInt64{};
constexpr Entry<87, OrtStatus*(const OrtKernelInfo*, const char* name, char*, size_t* size)> GetAttributeString{};
constexpr Entry<88, OrtStatus*(const OrtKernelContext*, size_t* count)> GetInputCount{};
constexpr Entry<90, OrtStatus*(const OrtKernelContext*, size_t index, const OrtValue**)> GetInput{};
constexpr Entry<91, OrtStatus*(OrtKernelContext*, size_t index, const int64_t* dims, size_t count, OrtValue**)>
    GetOutput{};
constexpr Entry<93, void(OrtStatus*)> ReleaseStatus{};
constexpr Entry<99, void(OrtTensorTypeAndShapeInfo*)> ReleaseTensorTypeAndShapeInfo{};
constexpr Entry<101, void(OrtCustomOpDomain*)> ReleaseCustomOpDomain{};
constexpr Entry<244, OrtStatus*(const OrtKernelInfo*, char*, size_t* size)> GetNodeName{};
constexpr Entry<249, OrtStatus*(const OrtKernelInfo*, size_t index, int* is_constant, const OrtValue**)>
    GetConstantInput{};
// Call work(user, i) for i in [0, total) on the session's threads and return when all are done. Threads take them in
// `batches` portions, in order.
constexpr Entry<274, OrtStatus*(const OrtKernelContext*, void (*work)(void* user, size_t i), size_t total,
                                size_t batches, void* user)>
    KernelParallelFor{};

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_ABI_H_
