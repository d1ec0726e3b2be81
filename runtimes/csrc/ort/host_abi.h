// The part of ONNX Runtime's C ABI that a program needs to load and run graphs; see abi.h. The numbers are those of the
// order of OrtApi's members in the official header; tests/capi/onnxruntime_test.cc calls each of them.
#ifndef EDGELM_ORT_HOST_ABI_H_
#define EDGELM_ORT_HOST_ABI_H_

#include "ort/abi.h"

extern "C" {

struct OrtEnv;
struct OrtSession;
struct OrtRunOptions;
struct OrtIoBinding;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtTypeInfo;

#if defined(_WIN32)
typedef wchar_t OrtPathCharacter;
#else
typedef char OrtPathCharacter;
#endif

// The entry point of the runtime's library is OrtGetApiBase.
typedef const OrtApiBase* (*OrtGetApiBaseFunction)();

}  // extern "C"

namespace edgelm::ort {

enum HostElementType : int { kFloat16 = 10 };
enum LogLevel : int { kFatal = 4 };
enum ExecutionMode : int { kSequential = 0 };
enum AllocatorType : int { kDeviceAllocator = 0 };
enum MemoryType : int { kDefaultMemory = 0 };

constexpr Entry<3, OrtStatus*(int level, const char* id, OrtEnv**)> CreateEnv{};
constexpr Entry<7, OrtStatus*(const OrtEnv*, const OrtPathCharacter* path, const OrtSessionOptions*, OrtSession**)>
    CreateSession{};
constexpr Entry<9, OrtStatus*(OrtSession*, const OrtRunOptions*, const char* const* inputs, const OrtValue* const*,
                              size_t count, const char* const* outputs, size_t output_count, OrtValue**)>
    RunSession{};
constexpr Entry<10, OrtStatus*(OrtSessionOptions**)> CreateSessionOptions{};
constexpr Entry<13, OrtStatus*(OrtSessionOptions*, int mode)> SetSessionExecutionMode{};
constexpr Entry<17, OrtStatus*(OrtSessionOptions*)> DisableMemPattern{};
constexpr Entry<22, OrtStatus*(OrtSessionOptions*, int level)> SetSessionLogSeverityLevel{};
constexpr Entry<24, OrtStatus*(OrtSessionOptions*, int threads)> SetIntraOpNumThreads{};
constexpr Entry<25, OrtStatus*(OrtSessionOptions*, int threads)> SetInterOpNumThreads{};
constexpr Entry<30, OrtStatus*(const OrtSession*, size_t*)> SessionGetInputCount{};
constexpr Entry<31, OrtStatus*(const OrtSession*, size_t*)> SessionGetOutputCount{};
constexpr Entry<32, OrtStatus*(const OrtSession*, size_t*)> SessionGetOverridableInitializerCount{};
constexpr Entry<33, OrtStatus*(const OrtSession*, size_t index, OrtTypeInfo**)> SessionGetInputTypeInfo{};
constexpr Entry<34, OrtStatus*(const OrtSession*, size_t index, OrtTypeInfo**)> SessionGetOutputTypeInfo{};
constexpr Entry<36, OrtStatus*(const OrtSession*, size_t index, OrtAllocator*, char**)> SessionGetInputName{};
constexpr Entry<37, OrtStatus*(const OrtSession*, size_t index, OrtAllocator*, char**)> SessionGetOutputName{};
constexpr Entry<38, OrtStatus*(const OrtSession*, size_t index, OrtAllocator*, char**)>
    SessionGetOverridableInitializerName{};
constexpr Entry<39, OrtStatus*(OrtRunOptions**)> CreateRunOptions{};
constexpr Entry<46, OrtStatus*(OrtRunOptions*)> RunOptionsSetTerminate{};
constexpr Entry<47, OrtStatus*(OrtRunOptions*)> RunOptionsUnsetTerminate{};
constexpr Entry<49, OrtStatus*(const OrtMemoryInfo*, void* data, size_t bytes, const int64_t* dims, size_t count,
                               int type, OrtValue**)>
    CreateTensorWithData{};
// The tensor's information, owned by the type's; nullptr if the type is no tensor.
constexpr Entry<55, OrtStatus*(const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**)> CastTypeInfoToTensorInfo{};
constexpr Entry<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int* type)> GetTensorElementType{};
constexpr Entry<69, OrtStatus*(int allocator_type, int memory_type, OrtMemoryInfo**)> CreateCpuMemoryInfo{};
constexpr Entry<76, OrtStatus*(OrtAllocator*, void*)> AllocatorFree{};
constexpr Entry<78, OrtStatus*(OrtAllocator**)> GetAllocatorWithDefaultOptions{};  // never freed
constexpr Entry<92, void(OrtEnv*)> ReleaseEnv{};
constexpr Entry<94, void(OrtMemoryInfo*)> ReleaseMemoryInfo{};
constexpr Entry<95, void(OrtSession*)> ReleaseSession{};
constexpr Entry<96, void(OrtValue*)> ReleaseValue{};
constexpr Entry<97, void(OrtRunOptions*)> ReleaseRunOptions{};
constexpr Entry<98, void(OrtTypeInfo*)> ReleaseTypeInfo{};
constexpr Entry<100, void(OrtSessionOptions*)> ReleaseSessionOptions{};
constexpr Entry<130, OrtStatus*(OrtSessionOptions*, const char* key, const char* value)> AddSessionConfigEntry{};
constexpr Entry<133, OrtStatus*(OrtSession*, const OrtRunOptions*, const OrtIoBinding*)> RunWithBinding{};
constexpr Entry<134, OrtStatus*(OrtSession*, OrtIoBinding**)> CreateIoBinding{};
constexpr Entry<135, void(OrtIoBinding*)> ReleaseIoBinding{};
// A binding keeps a reference of its own to the value's memory. Binding a name again replaces what it had.
constexpr Entry<136, OrtStatus*(OrtIoBinding*, const char* name, const OrtValue*)> BindInput{};
constexpr Entry<137, OrtStatus*(OrtIoBinding*, const char* name, const OrtValue*)> BindOutput{};
constexpr Entry<138, OrtStatus*(OrtIoBinding*, const char* name, const OrtMemoryInfo*)> BindOutputToDevice{};
// The array is freed with the allocator, each value in it with ReleaseValue.
constexpr Entry<140, OrtStatus*(const OrtIoBinding*, OrtAllocator*, OrtValue*** values, size_t* count)>
    GetBoundOutputValues{};
constexpr Entry<165, OrtStatus*(OrtRunOptions*, const char* key, const char* value)> AddRunConfigEntry{};

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_HOST_ABI_H_
