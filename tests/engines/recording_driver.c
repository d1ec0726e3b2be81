// A libcuda.so.1 that hands launches to Python and runs none. It has what libedgelm_plugins.so calls. Memory is host
// memory. (tests/cuda/fake_driver.c is the one that runs emulated kernels.)
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef void (*Launch)(const char* kernel, const unsigned* grid, unsigned threads, unsigned shared, const void* args);

static Launch g_launch;
static int g_sm = 86, g_version = 13000, g_capturing, g_context = 1;
static long g_allocated, g_early;

// Another device or test has another context: kernels are loaded anew in each.
void recording_driver(Launch launch, int sm, int version, int capturing) {
  g_context += launch != g_launch || sm != g_sm || version != g_version;
  g_launch = launch;
  g_sm = sm;
  g_version = version;
  g_capturing = capturing;
}
long recording_driver_allocated(void) { return g_allocated; }
long recording_driver_early(void) { return g_early; }

Result cuInit(unsigned flags) { return (int)flags; }
Result cuDriverGetVersion(int* version) { return *version = g_version, 0; }
Result cuGetErrorName(Result error, const char** text) { return *text = "CUDA_ERROR_X", error < 0; }
Result cuGetErrorString(Result error, const char** text) { return *text = "as the driver says", error < 0; }
Result cuCtxGetCurrent(void** context) { return *context = (void*)(size_t)g_context, 0; }
Result cuCtxGetDevice(int* device) { return *device = 40, 0; }
Result cuDeviceGetName(char* name, int size, int device) {
  return strncpy(name, device == 40 ? "Recorder" : "?", (size_t)size), 0;
}
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? g_sm / 10 : attribute == 76 ? g_sm % 10 : attribute == 16 ? 4 : 99 << 10;
  return device != 40;
}
Result cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options, void** values) {
  (void)options, (void)values;
  *module = strdup(image);
  return count != 2;
}
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = strdup(name);
  return module ? 0 : 500;
}
Result cuFuncSetAttribute(void* function, int attribute, int value) { return !function || attribute != 8 || value < 0; }
Result cuStreamIsCapturing(void* stream, int* capturing) { return *capturing = g_capturing, !stream; }
Result cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
  void* block = aligned_alloc(256, bytes);
  memset(block, 0xFF, bytes);
  *address = (size_t)block;
  g_allocated++;
  return g_capturing ? 900 : 0;
}
Result cuMemFree_v2(unsigned long long address) {
  free((void*)(size_t)address);
  g_allocated--;
  return 0;
}
Result cuMemsetD8Async(unsigned long long address, unsigned char value, size_t bytes, void* stream) {
  memset((void*)(size_t)address, value, bytes);
  return !stream;
}
Result cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz,
                      unsigned shared, void* stream, void** parameters, void** extra) {
  const unsigned grid[] = {x, y, z};
  if (!stream || extra || ty != 1 || tz != 1) return 1;
  g_launch(function, grid, threads, shared, parameters[0]);
  return 0;
}

// CUlaunchConfig with its attributes.
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  struct {
    int id, padding, value;
    char rest[60];
  }* attributes;
  unsigned count;
};
Result cuLaunchKernelEx(const struct Config* c, void* function, void** parameters, void** extra) {
  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
  if (c->count != 1 || c->attributes->id != 6 || c->attributes->value != 1) return 1;
  g_early++;
  return cuLaunchKernel(function, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared,
                        c->stream, parameters, extra);
}
