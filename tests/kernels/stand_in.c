// A stand-in for libcuda, libnvrtc and libcublasLt, as far as src/device/cuda calls them: device memory is the host's, launches
// are only told, products are made by plain loops in cuBLASLt's column-major terms. Every call worth a look is a line of stderr.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long Address;
#define TELL(...) fprintf(stderr, "stand-in: " __VA_ARGS__)
enum { OUT_OF_MEMORY = 2, INVALID = 1 };

// The driver: two GPUs.
static void* current;
static int live;
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGetCount(int* n) { *n = 2; return 0; }
int cuDeviceGet(int* device, int ordinal) { TELL("GPU %d\n", ordinal); *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &live; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { TELL("end with %d pieces of memory\n", live); return 0; }
// Processors, and compute capability 9.0; any other property is there.
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 16 ? 132 : attribute == 75 ? 9 : attribute == 76 ? 0 : 1;
    return 0;
}
int cuDeviceGetName(char* name, int size, int device) { strcpy(name, "stand-in"); return 0; }
int cuCtxGetCurrent(void** context) { *context = current; return 0; }
int cuCtxSetCurrent(void* context) { current = context; return 0; }
int cuGetErrorName(int error, const char** text) { *text = "CUDA_ERROR"; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "an error"; return 0; }
int cuStreamCreate(void** stream, unsigned flags) { *stream = &current; return 0; }
static void upload_all(void);
int cuStreamSynchronize(void* stream) { upload_all(); return 0; }
int cuStreamDestroy_v2(void* stream) { return 0; }
int cuDeviceGetDefaultMemPool(void** pool, int device) { *pool = &live; return 0; }
int cuMemPoolSetAttribute(void* pool, int attribute, void* value) { TELL("pool keeps %llu\n", *(Address*)value); return 0; }
int cuMemPoolTrimTo(void* pool, size_t bytes) { TELL("pool trimmed to %zu\n", bytes); return 0; }
int cuMemAllocAsync(Address* at, size_t bytes, void* stream) {
    if (!current) return INVALID;
    if (bytes > 1ull << 40) return OUT_OF_MEMORY;
    *at = (Address)aligned_alloc(512, (bytes + 511) / 512 * 512);
    memset((void*)*at, 0xff, bytes);
    live++;
    return 0;
}
int cuMemFreeAsync(Address at, void* stream) { upload_all(); free((void*)at); live--; return 0; }
// Copies are made when they are waited for, or at the next other call on the stream: memory reused too early would show.
static struct { Address to; const void* from; size_t bytes; } uploads[1 << 16];
static int n_uploads;
static void upload_all(void) {
    for (int i = 0; i < n_uploads; i++) memcpy((void*)uploads[i].to, uploads[i].from, uploads[i].bytes);
    n_uploads = 0;
}
int cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
    if (n_uploads == 1 << 16) return INVALID;
    uploads[n_uploads].to = to;
    uploads[n_uploads].from = from;
    uploads[n_uploads++].bytes = bytes;
    return 0;
}
int cuMemHostAlloc(void** at, size_t bytes, unsigned flags) { *at = aligned_alloc(4096, bytes); return 0; }
int cuMemFreeHost(void* at) { free(at); return 0; }
int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) { upload_all(); memcpy(to, (void*)from, bytes); return 0; }
int cuMemsetD8Async(Address at, unsigned char value, size_t bytes, void* stream) {
    upload_all();
    memset((void*)at, value, bytes);
    return 0;
}
int cuModuleLoadData(void** module, const void* code) { TELL("loaded %s\n", (const char*)code); *module = &current; return 0; }
int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = strdup(name); return 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) {
    TELL("%s may share %d (%d)\n", (char*)function, value, attribute);
    return 0;
}
// Shows arguments 4.. as three ints and a float: those of attention.
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz, unsigned shared,
                   void* stream, void** args, void** extra) {
    TELL("%s on %u x %u x %u of %u x %u x %u, shares %u: %d %d %d %g\n", (char*)function, x, y, z, threads, ty, tz, shared,
         *(int*)args[4], *(int*)args[5], *(int*)args[6], *(float*)args[7]);
    return 0;
}

// The compiler: its result is the name of the source and the first option.
static char made[256];
int nvrtcVersion(int* major, int* minor) { *major = 13; *minor = 0; return 0; }
int nvrtcCreateProgram(void** program, const char* source, const char* name, int n, const char** headers, const char** names) {
    for (int i = 0; i < n; i++)
        if (!strstr(headers[i], "#pragma once") || !strstr(names[i], ".cuh")) return 3;
    snprintf(made, sizeof made, "%s", name);
    *program = made;
    return 0;
}
int nvrtcCompileProgram(void* program, int n, const char** options) {
    TELL("compiled %s\n", made);
    snprintf(made + strlen(made), sizeof made - strlen(made), " %s", options[0]);
    return 0;
}
int nvrtcGetCUBINSize(void* program, size_t* bytes) { *bytes = strlen(made) + 1; return 0; }
int nvrtcGetCUBIN(void* program, char* code) { strcpy(code, made); return 0; }
int nvrtcDestroyProgram(void** program) { return 0; }

// The products.
typedef struct { int type; Address rows, columns; long long stride; } Layout;
typedef struct { int first_transposed, second_transposed; } Product;
int cublasLtCreate(void** handle) { *handle = &live; return 0; }
int cublasLtDestroy(void* handle) { return 0; }
int cublasLtMatrixLayoutCreate(Layout** layout, int type, Address rows, Address columns, long long stride) {
    *layout = malloc(sizeof(Layout));
    **layout = (Layout){type, rows, columns, stride};
    return 0;
}
// 68: f32 without TF32.
int cublasLtMatmulDescCreate(Product** product, int compute, int scale) {
    *product = calloc(1, sizeof(Product));
    return compute == 68 && scale == 0 ? 0 : 7;
}
int cublasLtMatmulDescSetAttribute(Product* product, int attribute, const void* value, size_t bytes) {
    *(attribute == 3 ? &product->first_transposed : &product->second_transposed) = *(int*)value;
    return bytes == 4 && (attribute == 3 || attribute == 4) ? 0 : 7;
}
int cublasLtMatmulPreferenceCreate(void** preference) { *preference = &live; return 0; }
int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t bytes) {
    return bytes == (attribute == 1 ? 8 : 4) ? 0 : 7;
}
int cublasLtMatmulPreferenceDestroy(void* preference) { return 0; }
// The result is a struct of 64 bytes of algorithm, a size, a status and more: 96 bytes.
int cublasLtMatmulAlgoGetHeuristic(void* handle, Product* product, Layout* a, Layout* b, Layout* c, Layout* d, void* preference,
                                   int wanted, void* result, int* n) {
    TELL("algorithm chosen\n");
    memset(result, 0, 96);
    *n = 1;
    return 0;
}
static float element(const void* matrix, const Layout* layout, int transposed, size_t i, size_t j) {
    size_t at = transposed ? j + i * layout->stride : i + j * layout->stride;
    if (layout->type == 0) return ((const float*)matrix)[at];
    unsigned bits = (unsigned)((const unsigned short*)matrix)[at] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
int cublasLtMatmul(void* handle, Product* product, const float* alpha, const void* a, Layout* la, const void* b, Layout* lb,
                   const float* beta, const void* c, Layout* lc, void* d, Layout* ld, void* algorithm, void* workspace, size_t bytes, void* stream) {
    size_t k = product->first_transposed ? la->rows : la->columns;
    upload_all();
    if (ld->type != 0 || c != d || !workspace || (Address)workspace % 256) return 7;
    for (size_t i = 0; i < ld->rows; i++)
        for (size_t j = 0; j < ld->columns; j++) {
            float sum = 0, *to = (float*)d + i + j * ld->stride;
            for (size_t l = 0; l < k; l++)
                sum += element(a, la, product->first_transposed, i, l) * element(b, lb, product->second_transposed, l, j);
            *to = *alpha * sum + (*beta == 0 ? 0 : *beta * *to);
        }
    return 0;
}
