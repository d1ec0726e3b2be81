// A fake libcuda.so.1 for machines without a GPU, which logs edgelm's calls and can make them fail.
// Memory is host memory. Its only kernel is `increment` of test_driver_calls.py. Launches and copies run at once, or
// are stored while a stream is captured. Environment variables configure it:
//   FAKE_CUDA_VERSION 13000, FAKE_CUDA_SM 86, FAKE_CUDA_DEVICES 1, FAKE_CUDA_MEMORY bytes of the GPU,
//   FAKE_CUDA_FAIL "cuStreamSynchronize=700": that function returns this error.
// FAKE_CUDA_LOG names a file to which every call is appended. If the toolkit's cuda.h is found, the compiler checks
// these declarations against it.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if __has_include(<cuda.h>)
#include <cuda.h>
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUfunction_attribute, CUjit_option, CUstreamCaptureMode;
typedef unsigned long long CUdeviceptr;
typedef struct {
  int id;
  char pad[8 - sizeof(int)];
  union {
    char pad[64];
    int programmaticStreamSerializationAllowed;
  } value;
} CUlaunchAttribute;
typedef struct {
  unsigned int gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
  void* hStream;
  CUlaunchAttribute* attrs;
  unsigned int numAttrs;
} CUlaunchConfig;
typedef void *CUcontext, *CUmodule, *CUfunction, *CUstream, *CUevent, *CUgraph, *CUgraphExec;
#endif

static long setting(const char* name, long otherwise) { return getenv(name) ? atol(getenv(name)) : otherwise; }

static CUresult called(const char* function, const char* format, ...) {
  if (getenv("FAKE_CUDA_LOG")) {
    FILE* file = fopen(getenv("FAKE_CUDA_LOG"), "a");
    va_list values;
    va_start(values, format);
    fprintf(file, "%s ", function);
    vfprintf(file, format, values);
    fprintf(file, "\n");
    fclose(file);
    va_end(values);
  }
  const char* fail = getenv("FAKE_CUDA_FAIL");
  size_t length = strlen(function);
  int fails = fail && !strncmp(fail, function, length) && fail[length] == '=';
  return (CUresult)(fails ? atoi(fail + length + 1) : 0);
}
#define CALLED(...)                                                                                                    \
  do {                                                                                                                 \
    CUresult status = called(__func__, __VA_ARGS__);                                                                   \
    if (status) return status;                                                                                         \
  } while (0)

CUresult cuDriverGetVersion(int* version) {
  *version = setting("FAKE_CUDA_VERSION", 13000);
  return called(__func__, "");
}
CUresult cuInit(unsigned int flags) {
  CALLED("%u", flags);
  return (CUresult)(setting("FAKE_CUDA_DEVICES", 1) ? 0 : 100);
}
CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_X";
  return (CUresult)0;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  (void)error;
  *text = "as the driver says";
  return (CUresult)0;
}

CUresult cuDeviceGetCount(int* count) {
  *count = setting("FAKE_CUDA_DEVICES", 1);
  return called(__func__, "");
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = 40 + ordinal;
  return called(__func__, "%d", ordinal);
}
CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
  snprintf(name, size, "Fake GPU %d", device - 40);
  return called(__func__, "");
}
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  *bytes = setting("FAKE_CUDA_MEMORY", 1L << 30);
  return called(__func__, "%d", device);
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  CALLED("%d %d", (int)attribute, device);
  int sm = setting("FAKE_CUDA_SM", 86);
  *value = attribute == 75 ? sm / 10 : attribute == 76 ? sm % 10 : -1;
  if (attribute == 16) *value = 14;
  if (attribute == 97) *value = 99 << 10;
  return (CUresult)0;
}

static int g_contexts;
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  g_contexts++;
  *context = (CUcontext)0x7000000000000010;
  return called(__func__, "%d", device);
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  g_contexts--;
  return called(__func__, "%d left %d", device, g_contexts);
}
CUresult cuCtxSetCurrent(CUcontext context) { return called(__func__, "%p", (void*)context); }
CUresult cuCtxSynchronize(void) { return called(__func__, ""); }

// The size of an allocation is stored in front of it.
static size_t g_used;
CUresult cuMemGetInfo_v2(size_t* available, size_t* total) {
  *total = setting("FAKE_CUDA_MEMORY", 1L << 30);
  *available = *total - g_used;
  return called(__func__, "");
}
CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  CALLED("%zu", bytes);
  if (bytes > (size_t)setting("FAKE_CUDA_MEMORY", 1L << 30) - g_used) return (CUresult)2;
  char* block = aligned_alloc(256, (bytes + 511) / 256 * 256);
  *(size_t*)block = bytes;
  g_used += bytes;
  *address = (CUdeviceptr)(block + 256);
  return (CUresult)0;
}
CUresult cuMemFree_v2(CUdeviceptr address) {
  char* block = (char*)address - 256;
  g_used -= *(size_t*)block;
  free(block);
  return called(__func__, "left %zu", g_used);
}
CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned int flags) {
  *address = malloc(bytes);
  return called(__func__, "%zu %u", bytes, flags);
}
CUresult cuMemFreeHost(void* address) {
  free(address);
  return called(__func__, "");
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned int count, CUjit_option* options,
                            void** values) {
  if (count != 2 || options[0] != 5 || options[1] != 6) return (CUresult)1;
  CUresult status = called(__func__, "%.8s", ((const char*)image)[0] == 0x7f ? "cubin" : "text");
  if (status) snprintf((char*)values[0], (size_t)values[1], "ptxas fatal : as the compiler says\nmore");
  *module = (CUmodule)0x7000000000000020;
  return status;
}
CUresult cuModuleUnload(CUmodule module) { return called(__func__, "%p", (void*)module); }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  CALLED("%p %s", (void*)module, name);
  *function = (CUfunction)0x7000000000000030;
  return (CUresult)(strcmp(name, "increment") ? 500 : 0);
}
CUresult cuFuncLoad(CUfunction function) { return called(__func__, "%p", (void*)function); }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return called(__func__, "%p %d %d", (void*)function, (int)attribute, value);
}

// -- work: run at once, or stored for the graph that is being captured ----------------------------------------------

struct Increment {
  float* x;
  int count;
  float by;
};
struct Work {
  struct Work* next;
  char *to, *from;
  size_t bytes;
  int value;
  struct Increment increment;
};
static struct Work *g_captured, **g_end;

static void perform(const struct Work* work) {
  if (work->from) memcpy(work->to, work->from, work->bytes);
  else if (work->to) memset(work->to, work->value, work->bytes);
  else
    for (int i = 0; i < work->increment.count; i++) work->increment.x[i] += work->increment.by;
}
static CUresult start(struct Work work) {
  if (!g_end) return perform(&work), (CUresult)0;
  *g_end = malloc(sizeof work);
  **g_end = work;
  g_end = &(*g_end)->next;
  return (CUresult)0;
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  CALLED("%zu %p", bytes, (void*)stream);
  return start((struct Work){.to = (char*)to, .from = (char*)from, .bytes = bytes});
}
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  CALLED("%zu %p", bytes, (void*)stream);
  return start((struct Work){.to = to, .from = (char*)from, .bytes = bytes});
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  CALLED("%zu %p", bytes, (void*)stream);
  return start((struct Work){.to = (char*)to, .from = (char*)from, .bytes = bytes});
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
  CALLED("%zu %p", bytes, (void*)stream);
  return start((struct Work){.to = (char*)to, .value = value, .bytes = bytes});
}
CUresult cuLaunchKernel(CUfunction function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx,
                        unsigned int by, unsigned int bz, unsigned int shared, CUstream stream, void** parameters,
                        void** extra) {
  CALLED("%p %u %u %u %u %u %u %u %p", (void*)function, gx, gy, gz, bx, by, bz, shared, (void*)stream);
  if (extra) return (CUresult)1;
  struct Work work = {0};
  memcpy(&work.increment, parameters[0], sizeof work.increment);
  return start(work);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** parameters, void** extra) {
  CALLED("%p attribute %d %d of %u", (void*)function, (int)c->attrs[0].id,
         c->attrs[0].value.programmaticStreamSerializationAllowed, c->numAttrs);
  return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, parameters, extra);
}

CUresult cuStreamCreate(CUstream* stream, unsigned int flags) {
  static size_t made;
  *stream = (CUstream)(0x7000000000000100 + ++made);
  return called(__func__, "%u", flags);
}
CUresult cuStreamDestroy_v2(CUstream stream) { return called(__func__, "%p", (void*)stream); }
CUresult cuStreamSynchronize(CUstream stream) { return called(__func__, "%p", (void*)stream); }
CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
  g_captured = 0;
  g_end = &g_captured;
  return called(__func__, "%p %d", (void*)stream, (int)mode);
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  g_end = 0;
  *graph = (CUgraph)g_captured;
  return called(__func__, "%p", (void*)stream);
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long flags) {
  *exec = (CUgraphExec)graph;
  return called(__func__, "%llu", flags);
}
CUresult cuGraphUpload(CUgraphExec exec, CUstream stream) {
  (void)exec;
  return called(__func__, "%p", (void*)stream);
}
CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
  CALLED("%p", (void*)stream);
  for (const struct Work* work = (const struct Work*)exec; work; work = work->next) perform(work);
  return (CUresult)0;
}
CUresult cuGraphDestroy(CUgraph graph) {
  (void)graph;
  return called(__func__, "");
}
CUresult cuGraphExecDestroy(CUgraphExec exec) {
  (void)exec;
  return called(__func__, "");
}
CUresult cuEventCreate(CUevent* event, unsigned int flags) {
  static size_t made;
  *event = (CUevent)(0x7000000000001000 + ++made);
  return called(__func__, "%u", flags);
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
  return called(__func__, "%p %p", (void*)event, (void*)stream);
}
CUresult cuEventSynchronize(CUevent event) { return called(__func__, "%p", (void*)event); }
CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
  *milliseconds = (float)((size_t)end - (size_t)start);
  return called(__func__, "");
}
CUresult cuEventDestroy_v2(CUevent event) { return called(__func__, "%p", (void*)event); }
