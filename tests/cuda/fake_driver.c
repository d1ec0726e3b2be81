// A fake libcuda.so.1 for machines without a GPU, which logs edgelm's calls and can make them fail.
// Memory is host memory, which begins as NaNs, with canaries before and behind each buffer. Launches and copies run at
// once, or are stored while a stream is captured. An image is one of two:
//   - a library of emulated kernels (emulated_images.py), which are run by the emulator (csrc/cuda/emulator.h);
//   - anything else: its only kernel is `increment` of test_driver_calls.py.
// Environment variables configure it:
//   FAKE_CUDA_VERSION 13000, FAKE_CUDA_SM 86, FAKE_CUDA_DEVICES 1, FAKE_CUDA_MEMORY bytes of the GPU,
//   CUDA_VISIBLE_DEVICES, as the driver reads it: "2,0", "GPU-1" (a UUID or its start), "MIG-1", up to the first wrong one,
//   FAKE_CUDA_MULTIPROCESSORS 14, FAKE_CUDA_SEED 0: the emulator's order of warps,
//   FAKE_CUDA_FAIL "cuStreamSynchronize=700": that function returns this error.
// An error that the emulator finds, or a canary that was overwritten, is error 999, whose text says what is wrong.
// FAKE_CUDA_LOG names a file to which every call is appended. If the toolkit's cuda.h is found, the compiler checks
// these declarations against it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if __has_include(<cuda.h>)
#include <cuda.h>
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUfunction_attribute, CUjit_option, CUstreamCaptureMode,
    CUstreamCaptureStatus;
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
// The numbers of the GPUs that CUDA_VISIBLE_DEVICES shows, all without it; returns how many.
static int visible(int numbers[16]) {
  const char* text = getenv("CUDA_VISIBLE_DEVICES");
  long all = setting("FAKE_CUDA_DEVICES", 1);
  int count = 0;
  for (; !text && count < all && count < 16; count++) numbers[count] = count;
  while (text && *text && count < 16) {
    char* end;
    text += strncmp(text, "GPU-", 4) && strncmp(text, "MIG-", 4) ? 0 : 4;
    long number = strtol(text, &end, 10);
    if (end == text || (*end && *end != ',') || number < 0 || number >= all) break;
    numbers[count++] = (int)number;
    text = *end ? end + 1 : end;
  }
  return count;
}
CUresult cuInit(unsigned int flags) {
  int numbers[16];
  CALLED("%u", flags);
  return (CUresult)(visible(numbers) ? 0 : 100);
}
CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_X";
  return (CUresult)0;
}
static char g_wrong[1024];  // the text of error 999
static CUresult wrong(const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(g_wrong, sizeof g_wrong, format, values);
  va_end(values);
  return (CUresult)999;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == 999 && g_wrong[0] ? g_wrong : "as the driver says";
  return (CUresult)0;
}

CUresult cuDeviceGetCount(int* count) {
  int numbers[16];
  *count = visible(numbers);
  return called(__func__, "");
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  int numbers[16];
  if (ordinal < 0 || ordinal >= visible(numbers)) return (CUresult)101;
  *device = 40 + numbers[ordinal];
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
  if (attribute == 16) *value = setting("FAKE_CUDA_MULTIPROCESSORS", 14);
  if (attribute == 97) *value = 99 << 10;
  return (CUresult)0;
}

static int g_contexts;
static CUdevice g_device;  // of the context
static __thread CUcontext t_current;
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  g_contexts++;
  g_device = device;
  *context = (CUcontext)0x7000000000000010;
  return called(__func__, "%d", device);
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  g_contexts--;
  return called(__func__, "%d left %d", device, g_contexts);
}
CUresult cuCtxSetCurrent(CUcontext context) {
  t_current = context;
  return called(__func__, "%p", (void*)context);
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = t_current;
  return called(__func__, "");
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = g_device;
  return (CUresult)(t_current ? called(__func__, "") : 201);
}

// Before the bytes of an allocation is this head, padded with a canary; behind them is another canary.
enum { kCanary = 256, kCanaryByte = 0xa5 };
struct Buffer {
  struct Buffer *next, **link;
  size_t bytes;
};
static struct Buffer* g_buffers;
static size_t g_used;

static CUresult check(const struct Buffer* buffer) {
  const unsigned char* data = (const unsigned char*)buffer + kCanary;
  for (size_t i = 0; i < kCanary; i++) {
    int before = i >= sizeof *buffer && ((const unsigned char*)buffer)[i] != kCanaryByte;
    if (before || data[buffer->bytes + i] != kCanaryByte) {
      return wrong("a kernel wrote %s the buffer of %zu bytes at %p", before ? "before" : "behind", buffer->bytes,
                   data);
    }
  }
  return (CUresult)0;
}
static CUresult check_all(void) {
  CUresult status = (CUresult)0;
  for (struct Buffer* one = g_buffers; one && !status; one = one->next) status = check(one);
  return status;
}

CUresult cuCtxSynchronize(void) {
  CALLED("");
  return check_all();
}
CUresult cuMemGetInfo_v2(size_t* available, size_t* total) {
  *total = setting("FAKE_CUDA_MEMORY", 1L << 30);
  *available = *total - g_used;
  return called(__func__, "");
}
CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  CALLED("%zu", bytes);
  if (bytes > (size_t)setting("FAKE_CUDA_MEMORY", 1L << 30) - g_used) return (CUresult)2;
  struct Buffer* made = aligned_alloc(256, (bytes + 2 * kCanary + 255) / 256 * 256);
  memset(made, kCanaryByte, kCanary);
  *made = (struct Buffer){.next = g_buffers, .link = &g_buffers, .bytes = bytes};
  if (g_buffers) g_buffers->link = &made->next;
  g_buffers = made;
  char* data = (char*)made + kCanary;
  memset(data, 0xff, bytes);
  memset(data + bytes, kCanaryByte, kCanary);
  g_used += bytes;
  *address = (CUdeviceptr)data;
  return (CUresult)0;
}
CUresult cuMemFree_v2(CUdeviceptr address) {
  struct Buffer* buffer = (struct Buffer*)((char*)address - kCanary);
  CUresult status = check(buffer);
  *buffer->link = buffer->next;
  if (buffer->next) buffer->next->link = buffer->link;
  g_used -= buffer->bytes;
  free(buffer);
  CUresult failed = called(__func__, "left %zu", g_used);
  return failed ? failed : status;
}
CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned int flags) {
  *address = malloc(bytes);
  return called(__func__, "%zu %u", bytes, flags);
}
CUresult cuMemFreeHost(void* address) {
  free(address);
  return called(__func__, "");
}

// -- modules: `increment`, or a library of emulated kernels ---------------------------------------------------------

struct Increment {
  float* x;
  int count;
  float by;
};
typedef const char* Emulated(const char* name, const int* grid, int threads, size_t shared, const void* args,
                             size_t args_bytes, unsigned seed);
struct Kernel {
  struct Kernel* next;
  Emulated* run;  // null: increment
  char name[128];
  size_t args_bytes;
  int shared;  // dynamic shared memory that it may use
};
struct Module {
  void* library;
  Emulated* run;
};
static struct Module g_increments = {0, 0};
static struct Kernel* g_kernels;

// The bytes of an image that is a shared library of this machine, or 0. Its section headers are at its end.
static size_t library_bytes(const void* image) {
  const Elf64_Ehdr* head = image;
  if (memcmp(image, ELFMAG, SELFMAG) || head->e_ident[EI_CLASS] != ELFCLASS64 || head->e_type != ET_DYN) return 0;
  return head->e_shoff + (size_t)head->e_shnum * head->e_shentsize;
}

static CUresult load_library(struct Module* module, const void* image, size_t bytes) {
  // The file stays open: the loader recognises libraries by this name, so that no other may get its number.
  int file = memfd_create("kernels", MFD_CLOEXEC);
  char path[64];
  snprintf(path, sizeof path, "/proc/self/fd/%d", file);
  if (file < 0 || write(file, image, bytes) != (ssize_t)bytes) return wrong("no memory for an image");
  module->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (module->library) module->run = (Emulated*)dlsym(module->library, "edgelm_emulated_launch");
  return module->run ? (CUresult)0 : wrong("not a library of emulated kernels: %s", dlerror());
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned int count, CUjit_option* options,
                            void** values) {
  if (count != 2 || options[0] != 5 || options[1] != 6) return (CUresult)1;
  CUresult status = called(__func__, "%.8s", ((const char*)image)[0] == 0x7f ? "cubin" : "text");
  if (status) snprintf((char*)values[0], (size_t)values[1], "ptxas fatal : as the compiler says\nmore");
  struct Module* made = &g_increments;
  size_t bytes = library_bytes(image);
  if (!status && bytes) {
    made = calloc(1, sizeof *made);
    status = load_library(made, image, bytes);
  }
  *module = (CUmodule)made;
  return status;
}
CUresult cuModuleUnload(CUmodule module) { return called(__func__, "%p", (void*)module); }

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  CALLED("%p %s", (void*)module, name);
  Emulated* run = ((struct Module*)module)->run;
  size_t args_bytes = sizeof(struct Increment);
  if (run) {
    // The emulator refuses a launch without arguments and says how many bytes the kernel takes.
    int grid[3] = {1, 1, 1};
    const char* said = strstr(run(name, grid, 32, 0, 0, (size_t)-1, 0), "its arguments are ");
    if (!said || sscanf(said, "its arguments are %zu", &args_bytes) != 1) return (CUresult)500;
  } else if (strcmp(name, "increment")) {
    return (CUresult)500;
  }
  struct Kernel* made = calloc(1, sizeof *made);
  snprintf(made->name, sizeof made->name, "%s", name);
  made->run = run;
  made->args_bytes = args_bytes;
  made->shared = 48 << 10;
  made->next = g_kernels;  // kept as long as the process, as are the libraries
  g_kernels = made;
  *function = (CUfunction)made;
  return (CUresult)0;
}
CUresult cuFuncLoad(CUfunction function) { return called(__func__, "%p", (void*)function); }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == 8) ((struct Kernel*)function)->shared = value;
  return called(__func__, "%p %d %d", (void*)function, (int)attribute, value);
}

// -- work: run at once, or stored for the graph that is being captured ----------------------------------------------

struct Work {
  struct Work* next;
  char *to, *from;
  size_t bytes;
  int value;
  const struct Kernel* kernel;
  int grid[3], threads;
  size_t shared;
  unsigned char args[1024];
};
static struct Work *g_captured, **g_end;

static CUresult launch(const struct Work* work) {
  const struct Kernel* kernel = work->kernel;
  if (!kernel->run) {
    const struct Increment* args = (const struct Increment*)work->args;
    for (int i = 0; i < args->count; i++) args->x[i] += args->by;
    return (CUresult)0;
  }
  static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;  // the emulator's state is one per library
  pthread_mutex_lock(&mutex);
  const char* said = kernel->run(kernel->name, work->grid, work->threads, work->shared, work->args, kernel->args_bytes,
                                 (unsigned)setting("FAKE_CUDA_SEED", 0));
  CUresult status = said ? wrong("emulated kernel %s", said) : (CUresult)0;
  pthread_mutex_unlock(&mutex);
  return status;
}
static CUresult perform(const struct Work* work) {
  if (work->kernel) return launch(work);
  if (work->from) memcpy(work->to, work->from, work->bytes);
  else memset(work->to, work->value, work->bytes);
  return (CUresult)0;
}
static CUresult start(struct Work work) {
  if (!g_end) return perform(&work);
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
  const struct Kernel* kernel = (const struct Kernel*)function;
  struct Work work = {.kernel = kernel, .grid = {gx, gy, gz}, .threads = bx, .shared = shared};
  if (extra || by != 1 || bz != 1 || kernel->args_bytes > sizeof work.args) return (CUresult)1;
  if (kernel->run && shared > (unsigned)kernel->shared) return (CUresult)1;
  memcpy(work.args, parameters[0], kernel->args_bytes);
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
CUresult cuStreamSynchronize(CUstream stream) {
  CALLED("%p", (void*)stream);
  return check_all();
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = (CUstreamCaptureStatus)(g_end != 0);
  return called(__func__, "%p", (void*)stream);
}
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
  CUresult status = (CUresult)0;
  for (const struct Work* work = (const struct Work*)exec; work && !status; work = work->next) status = perform(work);
  return status;
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
