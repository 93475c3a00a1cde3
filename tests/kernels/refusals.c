// What the stand-in refuses (stand_in.c), once each, beside the same call as it is accepted: a refusal that nothing provokes might be none.
// Prints a line for each call whose answer is another; exits 1 then.
#include "stand_in.c"

static int n_calls, n_wrong;
static void expect(int wanted, int answer, const char* call) {
    n_calls++;
    if (answer == wanted) return;
    n_wrong++;
    printf("%s: answers %d, should answer %d\n", call, answer, wanted);
}
#define REFUSED(how, call) expect(how, call, #call)
#define ACCEPTED(call) expect(0, call, #call)
enum { CUBLAS_INVALID = 7 };

static Stream *compute, *copies;
static Address memory;
static Function kernel = {.name = "scale_f32"}; // which needs no library
static float* no_floats;
static long long no_elements;
static float factor = 1;
static void* scale_args[] = {&no_floats, &no_elements, &factor};

static void in_memory(void) {
    Address at;
    REFUSED(INVALID, cuMemAlloc_v2(&at, 256)); // no context yet
    cuCtxSetCurrent(&live);
    REFUSED(INVALID, cuMemAlloc_v2(&at, 0));
    REFUSED(OUT_OF_MEMORY, cuMemAlloc_v2(&at, 1ull << 50));
    ACCEPTED(cuMemAlloc_v2(&at, 256));
    ACCEPTED(cuMemAlloc_v2(&memory, 256));
    char host[256] = {0};
    ACCEPTED(cuMemcpyHtoDAsync_v2(at, host, 256, compute));
    REFUSED(INVALID, cuMemcpyHtoDAsync_v2(at, host, 257, compute)); // past its end
    REFUSED(INVALID, cuMemcpyHtoDAsync_v2(at - 1, host, 2, compute));
    ACCEPTED(cuMemcpyDtoHAsync_v2(host, at + 128, 128, compute));
    REFUSED(INVALID, cuMemcpyDtoHAsync_v2(host, at + 129, 128, compute));
    ACCEPTED(cuMemcpyDtoDAsync_v2(at, memory, 256, compute));
    REFUSED(INVALID, cuMemcpyDtoDAsync_v2(at + 1, memory, 256, compute));
    REFUSED(INVALID, cuMemcpyDtoDAsync_v2(at, memory + 1, 256, compute));
    ACCEPTED(cuMemsetD8Async(at, 0, 256, compute));
    REFUSED(INVALID, cuMemsetD8Async(at, 0, 257, compute));
    REFUSED(INVALID, cuMemFree_v2(at + 16)); // amid a piece
    ACCEPTED(cuMemFree_v2(at));
    REFUSED(INVALID, cuMemFree_v2(at)); // twice
    REFUSED(INVALID, cuMemcpyHtoDAsync_v2(at, host, 1, compute)); // after it was freed
    REFUSED(INVALID, cuMemcpyDtoHAsync_v2(host, at, 1, compute));
    REFUSED(INVALID, cuMemsetD8Async(at, 0, 1, compute));
}

static Config grid(unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared) {
    return (Config){x, y, z, threads, 1, 1, shared, compute};
}
static int launched(unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared) {
    Config config = grid(x, y, z, threads, shared);
    return cuLaunchKernelEx(&config, &kernel, scale_args, 0);
}
// With n attributes of an id and a value.
static int launched_as(Stream* stream, unsigned n, int id, int value) {
    Attribute attribute = {id};
    attribute.value.allowed = value;
    Config config = grid(1, 1, 1, 32, 0);
    config.stream = stream, config.attributes = &attribute, config.n = n;
    return cuLaunchKernelEx(&config, &kernel, scale_args, 0);
}
static void in_launches(void) {
    ACCEPTED(launched(1, 1, 1, 1024, 48 << 10));
    ACCEPTED(launched((1u << 31) - 1, 65535, 65535, 32, 0));
    REFUSED(INVALID, launched(0, 1, 1, 32, 0));
    REFUSED(INVALID, launched(1, 0, 1, 32, 0));
    REFUSED(INVALID, launched(1, 1, 0, 32, 0));
    REFUSED(INVALID, launched(1u << 31, 1, 1, 32, 0));
    REFUSED(INVALID, launched(1, 65536, 1, 32, 0));
    REFUSED(INVALID, launched(1, 1, 65536, 32, 0));
    REFUSED(INVALID, launched(1, 1, 1, 0, 0));
    REFUSED(INVALID, launched(1, 1, 1, 1025, 0));
    REFUSED(INVALID, launched(1, 1, 1, 32, (48 << 10) + 1)); // not asked for
    REFUSED(INVALID, cuFuncSetAttribute(&kernel, 8, (227 << 10) + 1));
    REFUSED(INVALID, cuFuncSetAttribute(&kernel, 9, 1 << 10));
    ACCEPTED(cuFuncSetAttribute(&kernel, 8, 100 << 10));
    ACCEPTED(launched(1, 1, 1, 32, 100 << 10));
    REFUSED(INVALID, launched(1, 1, 1, 32, (100 << 10) + 1)); // more than was asked for
    ACCEPTED(launched_as(compute, 1, 6, 1));
    REFUSED(INVALID, launched_as(compute, 1, 7, 1));
    REFUSED(INVALID, launched_as(compute, 1, 6, 0));
    REFUSED(INVALID, launched_as(compute, 2, 6, 1));
    Function* function;
    ACCEPTED(cuModuleGetFunction(&function, 0, "scale_f32")); // of no library
    REFUSED(INVALID, cuModuleGetFunction(&function, dlopen(0, RTLD_NOW), "no_such_kernel"));
    void *module, *functions[2];
    ACCEPTED(cuModuleEnumerateFunctions(functions, 1, 0));
    REFUSED(INVALID, cuModuleEnumerateFunctions(functions, 2, 0)); // more than it has
    setenv("STAND_IN_KERNELS", "/nowhere", 1);
    REFUSED(INVALID, cuModuleLoadData(&module, "scale.cu"));
    unsetenv("STAND_IN_KERNELS");
    ACCEPTED(cuModuleLoadData(&module, "scale.cu"));
}

// A matrix for the copy engine that is accepted, and what is wrong with others.
typedef struct { Address map, at, sizes[3], strides[2]; unsigned box[3], steps[3], rank; } Encoded;
static int encoded(Encoded e) {
    _Alignas(64) Address map[16];
    return cuTensorMapEncodeTiled((Address*)((Address)map + e.map), 9, e.rank, (void*)e.at, e.sizes, e.strides, e.box, e.steps, 0, 3, 3, 0);
}
static Encoded right(void) {
    return (Encoded){.at = memory, .sizes = {128, 8, 70}, .strides = {256, 2048}, .box = {64, 1, 128}, .steps = {1, 1, 1}, .rank = 3};
}
#define WRONG(...) do { Encoded e = right(); __VA_ARGS__; expect(INVALID, encoded(e), "a matrix with " #__VA_ARGS__); } while (0)
static void in_matrices_of_the_copy_engine(void) {
    ACCEPTED(encoded(right()));
    WRONG(e.map = 8);
    WRONG(e.at += 8);
    WRONG(e.rank = 2);
    for (int i = 0; i < 3; i++) {
        WRONG(e.sizes[i] = 0);
        WRONG(e.sizes[i] = (1ull << 32) + 1; e.strides[0] = e.strides[1] = 1ull << 34);
        WRONG(e.box[i] = 0);
        WRONG(e.steps[i] = 2);
    }
    WRONG(e.box[1] = 257);
    WRONG(e.box[2] = 257);
    WRONG(e.box[0] = 72); // wider than the swizzle
    for (int i = 0; i < 2; i++) {
        WRONG(e.strides[i] += 8);
        WRONG(e.strides[i] = 1ull << 40);
        WRONG(e.strides[i] = 240); // less than a row
    }
}

static void in_captures(void) {
    Event *event, *other;
    cuEventCreate(&event, 2), cuEventCreate(&other, 2);
    Capture *graph, *executable;
    Address at;
    void* host;
    REFUSED(INVALID, cuStreamBeginCapture_v2(compute, 0)); // not relaxed
    stand_in_refuse_captures(1);
    REFUSED(NOT_SUPPORTED, cuStreamBeginCapture_v2(compute, 2));
    stand_in_refuse_captures(0);
    ACCEPTED(cuEventRecord(other, copies));
    ACCEPTED(cuStreamBeginCapture_v2(compute, 2));
    REFUSED(UNSUPPORTED, cuStreamSynchronize(compute));
    REFUSED(UNSUPPORTED, cuMemcpyHtoDAsync_v2(memory, &at, 8, compute));
    REFUSED(UNSUPPORTED, cuMemcpyDtoHAsync_v2(&at, memory, 8, compute));
    REFUSED(UNSUPPORTED, cuMemFree_v2(memory));
    REFUSED(UNSUPPORTED, cuMemHostAlloc(&host, 4096, 0));
    Function* function;
    REFUSED(UNSUPPORTED, cuModuleLoadData(&host, "scale.cu"));
    REFUSED(UNSUPPORTED, cuModuleGetFunction(&function, &live, "scale_f32")); // of a module whose kernels are not loaded
    REFUSED(UNSUPPORTED, cuFuncLoad(&live));
    REFUSED(ISOLATION, cuStreamWaitEvent(compute, other, 0)); // of what is not captured
    REFUSED(INVALID, launched_as(compute, 1, 6, 1)); // dependent on no kernel
    ACCEPTED(launched_as(compute, 0, 0, 0));
    ACCEPTED(launched_as(compute, 1, 6, 1));
    ACCEPTED(cuMemsetD8Async(memory, 0, 8, compute));
    REFUSED(INVALID, launched_as(compute, 1, 6, 1)); // dependent on zeros
    ACCEPTED(cuEventRecord(event, compute));
    REFUSED(CAPTURED, cuEventSynchronize(event));
    REFUSED(CAPTURED, cuEventQuery(event));
    ACCEPTED(cuStreamWaitEvent(copies, event, 0)); // the stream enters
    REFUSED(UNJOINED, cuStreamEndCapture(compute, &graph));
    n_captures = 0;
    REFUSED(CAPTURED, cuStreamWaitEvent(copies, event, 0)); // of a capture that is over
    ACCEPTED(cuStreamBeginCapture_v2(compute, 2));
    REFUSED(INVALID, cuStreamBeginCapture_v2(copies, 2)); // beside another
    copies->capture = 0, n_captures = 1;
    ACCEPTED(cuEventRecord(event, compute));
    ACCEPTED(cuStreamWaitEvent(copies, event, 0));
    ACCEPTED(cuEventRecord(other, copies));
    ACCEPTED(cuStreamWaitEvent(compute, other, 0)); // and joins again
    ACCEPTED(cuStreamEndCapture(compute, &graph));
    REFUSED(INVALID, cuGraphInstantiateWithFlags(&executable, graph, 1));
    ACCEPTED(cuGraphInstantiateWithFlags(&executable, graph, 0));
    ACCEPTED(cuGraphLaunch(executable, compute));
    cuCtxSetCurrent(0);
    REFUSED(INVALID, cuEventRecord(event, compute)); // no context
    REFUSED(INVALID, cuMemcpyHtoDAsync_v2(memory, &at, 8, compute));
    cuCtxSetCurrent(&live);
    ACCEPTED(cuMemsetD8Async(memory, 0, 8, compute));
    REFUSED(INVALID, cuStreamDestroy_v2(compute)); // with work
    ACCEPTED(cuStreamSynchronize(compute));
    ACCEPTED(cuStreamDestroy_v2(compute));
}

static void in_the_compiler(void) {
    void* program;
    const char *header[] = {"#pragma once\n"}, *bare[] = {"\n"}, *name[] = {"a.cuh"}, *other[] = {"a.h"};
    ACCEPTED(nvrtcCreateProgram(&program, "", "a.cu", 1, header, name));
    REFUSED(3, nvrtcCreateProgram(&program, "", "a.cu", 1, bare, name));
    REFUSED(3, nvrtcCreateProgram(&program, "", "a.cu", 1, header, other));
}

// A product of layouts [32, 16] and [32, 48], the first transposed, of a type; `wrong` changes something.
typedef struct { Layout a, b, c; Product product; Address workspace; int other_c; } Multiplied;
static int multiplied(Multiplied m) {
    float one = 1, zero = 0;
    Address algorithm[8] = {1};
    Layout c = m.c;
    static float operands[3][64 * 64];
    return cublasLtMatmul(0, &m.product, &one, operands[0], &m.a, operands[1], &m.b, &zero, operands[2], m.other_c ? &m.c : &c, operands[2],
                          &c, algorithm, (void*)m.workspace, 256, compute);
}
static Multiplied product_of(int type) {
    static float scale = 1;
    return (Multiplied){{type, 32, 16, 32}, {type, 32, 48, 32}, {0, 16, 48, 16}, {.first_transposed = 1, .first_scale = &scale, .second_scale = &scale}, 512};
}
#define WRONG_PRODUCT(...) do { Multiplied m = product_of(28); __VA_ARGS__; expect(CUBLAS_INVALID, multiplied(m), "a product with " #__VA_ARGS__); } while (0)
static void in_products(void) {
    Layout* layout;
    ACCEPTED(cublasLtMatrixLayoutCreate(&layout, 0, 4, 3, 4));
    REFUSED(CUBLAS_INVALID, cublasLtMatrixLayoutCreate(&layout, 0, 0, 3, 4));
    REFUSED(CUBLAS_INVALID, cublasLtMatrixLayoutCreate(&layout, 0, 4, 0, 4));
    REFUSED(CUBLAS_INVALID, cublasLtMatrixLayoutCreate(&layout, 0, 4, 3, 3));
    Product* product;
    ACCEPTED(cublasLtMatmulDescCreate(&product, 68, 0));
    REFUSED(CUBLAS_INVALID, cublasLtMatmulDescCreate(&product, 77, 0)); // TF32
    REFUSED(CUBLAS_INVALID, cublasLtMatmulDescCreate(&product, 68, 2));
    int transposed = 1, by_rows = 3, another_way = 2;
    float* scale = &factor;
    ACCEPTED(cublasLtMatmulDescSetAttribute(product, 3, &transposed, 4));
    REFUSED(CUBLAS_INVALID, cublasLtMatmulDescSetAttribute(product, 3, &transposed, 8));
    REFUSED(CUBLAS_INVALID, cublasLtMatmulDescSetAttribute(product, 5, &transposed, 4));
    ACCEPTED(cublasLtMatmulDescSetAttribute(product, 17, &scale, 8));
    REFUSED(CUBLAS_INVALID, cublasLtMatmulDescSetAttribute(product, 17, &scale, 4));
    ACCEPTED(cublasLtMatmulDescSetAttribute(product, 31, &by_rows, 4));
    REFUSED(CUBLAS_INVALID, cublasLtMatmulDescSetAttribute(product, 31, &another_way, 4));
    Preference* preference;
    cublasLtMatmulPreferenceCreate(&preference);
    ACCEPTED(cublasLtMatmulPreferenceSetAttribute(preference, 1, &memory, 8));
    REFUSED(CUBLAS_INVALID, cublasLtMatmulPreferenceSetAttribute(preference, 1, &memory, 4));
    Address algorithm[8] = {3}, unknown[8] = {4};
    Result result;
    ACCEPTED(cublasLtMatmulAlgoCheck(0, 0, 0, 0, 0, 0, algorithm, &result));
    REFUSED(CUBLAS_INVALID, cublasLtMatmulAlgoCheck(0, 0, 0, 0, 0, 0, unknown, &result));
    ACCEPTED(multiplied(product_of(28)));
    ACCEPTED(multiplied(product_of(14)));
    WRONG_PRODUCT(m.b.type = 14); // E4M3 by bf16
    WRONG_PRODUCT(m.product.first_transposed = 0);
    WRONG_PRODUCT(m.product.second_transposed = 1);
    WRONG_PRODUCT(m.a.rows = m.b.rows = 40);
    WRONG_PRODUCT(m.a.columns = 24);
    WRONG_PRODUCT(m.product.first_scale = 0);
    WRONG_PRODUCT(m.product.second_scale = 0);
    WRONG_PRODUCT(m.product.first_by_rows = 1); // and the other as a whole
    WRONG_PRODUCT(m.c.type = 14, m.a.type = m.b.type = 0); // bf16 from floats
    WRONG_PRODUCT(m.c.type = 28);
    WRONG_PRODUCT(m.workspace = 0);
    WRONG_PRODUCT(m.workspace = 128);
    WRONG_PRODUCT(m.other_c = 1); // another layout than the output's
}

int main() {
    freopen("/dev/null", "w", stderr);
    void *stream[2], *blocking;
    ACCEPTED(cuStreamCreateWithPriority(&stream[0], 1, 0));
    ACCEPTED(cuStreamCreateWithPriority(&stream[1], 1, 0));
    REFUSED(INVALID, cuStreamCreateWithPriority(&blocking, 0, 0)); // waits for the default stream
    compute = stream[0], copies = stream[1];
    in_memory();
    in_launches();
    in_matrices_of_the_copy_engine();
    in_products();
    in_the_compiler();
    in_captures();
    printf("%d calls\n", n_calls);
    return n_wrong > 0;
}
