// What Hopper (sm_90a) has beyond common.cuh, behind small functions: bulk copies of tensor tiles (TMA), barriers in shared memory
// that count bytes (mbarrier), matrix products of a warpgroup (wgmma), registers that change hands (setmaxnreg), named barriers, and
// blocks that see each other's shared memory (clusters).
// With TRIREME_EMULATE the same names run on the CPU (emulate_hopper.h). Knows nothing of any operation.
//
// A tile of ROWS rows of D elements lies in shared memory as D / 64 panels [ROWS, 64], rows of 128 bytes, with the 16-byte pieces of
// a row exchanged by the 128-byte swizzle: piece p of row r is at p ^ r % 8. Panels begin at multiples of 1024 bytes, so ROWS is a
// multiple of 8. Both the copies and the products know this form (PTX ISA 9.0: tensor swizzling modes; wgmma shared memory layout).
#pragma once
#include "common.cuh"

// A matrix of bf16 in device memory for the copy engine: what cuTensorMapEncodeTiled makes, (dim, head, token) with the dims innermost.
struct alignas(128) TensorMap {
    unsigned long long words[16];
};
typedef unsigned long long Mbarrier;
// An operand of wgmma in shared memory (matrix descriptor).
typedef unsigned long long Matrix;

#define LOG2_E 1.4426950408889634f
#define WARPGROUP 128
#define SWIZZLED_BYTES 1024

#ifdef TRIREME_EMULATE
#include "emulate_hopper.h"
#else
// Shared memory of the block from the first multiple of 1024 bytes on; the launch asks for 1024 more.
__device__ __forceinline__ unsigned char* aligned_shared(unsigned char* memory) {
    return memory + (0u - shared_address(memory)) % SWIZZLED_BYTES;
}

// 2 to the x, to 2 ulp.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int n_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_arrivals) : "memory");
}
// By the thread that initialised them: the copy engine sees the barriers. The other threads need a __syncthreads besides.
__device__ __forceinline__ void mbarrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives; the phase ends when `bytes` bytes have come as well.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended. Of a new barrier the phase before the first one, of parity 1, counts as ended.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, int parity) {
    asm volatile("{\n.reg .pred ended;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n@!ended bra again;\n}" ::"r"(
                     shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

// A hint: the box that begins there will be loaded.
__device__ __forceinline__ void tensor_hint(const TensorMap* map, int dim, int head, int token) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(map), "r"(dim), "r"(head), "r"(token)
                 : "memory");
}
__device__ __forceinline__ void tensor_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// One box of the map from (dim, head, token) on to `to`, counted by the barrier; zeros where the box is outside the matrix.
__device__ __forceinline__ void tensor_load(void* to, const TensorMap* map, int dim, int head, int token, Mbarrier* barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
                     shared_address(to)),
                 "l"(map), "r"(dim), "r"(head), "r"(token), "r"(shared_address(barrier))
                 : "memory");
}

// Which block of its cluster this is. Clusters are of a kernel that says __cluster_dims__, along x.
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// Waits for all threads of all BLOCKS blocks of the cluster, whose writes to shared memory are seen from here on.
template <int BLOCKS> __device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// Arrives at the barrier that block `rank` of the cluster has in this place: what this thread's block has read, or had wgmma read, may be
// written over. It tells of reads only, so it asks for no release to the cluster, nor does who waits (mbarrier_wait) for an acquire of it:
// ptxas makes fences over all memory of those, one of the whole device at every step of a ring.
__device__ __forceinline__ void mbarrier_arrive_at(Mbarrier* barrier, int rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
                 "r"(rank)
                 : "memory");
}
// As tensor_load, to the same place in all BLOCKS blocks of the cluster, counted by the barrier that each has in the place of this one.
template <int BLOCKS>
__device__ __forceinline__ void tensor_load_to_all(void* to, const TensorMap* map, int dim, int head, int token, Mbarrier* barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4}], "
                 "[%5], %6;" ::"r"(shared_address(to)),
                 "l"(map), "r"(dim), "r"(head), "r"(token), "r"(shared_address(barrier)), "h"((unsigned short)((1 << BLOCKS) - 1))
                 : "memory");
}

// Registers of each thread of this warpgroup from here on.
template <int N> __device__ __forceinline__ void registers_fewer() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// Barrier `id` (1 to 15) of n threads: waits for all, or is counted without waiting.
__device__ __forceinline__ void barrier_wait(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }
__device__ __forceinline__ void barrier_arrive(int id, int n) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n) : "memory"); }

// Registers written so far are those that the next products read.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING of the groups this warp committed are under way, for the operands of the others; their sums may be those
// of products that go on.
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The same; `sums` are among those that ended. The compiler is
// shown that they change here, so that no read of them moves up.
template <int PENDING, int N> __device__ __forceinline__ void wgmma_wait(float (&sums)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

#define REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define REGISTERS_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define REGISTERS_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define REGISTERS_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define REGISTERS_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define REGISTERS_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define REGISTERS_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define REGISTERS_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define REGISTERS_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define REGISTERS_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define REGISTERS_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_8(how, d, i)                                                                                                            \
    how "f"(d[i]), how "f"(d[i + 1]), how "f"(d[i + 2]), how "f"(d[i + 3]), how "f"(d[i + 4]), how "f"(d[i + 5]), how "f"(d[i + 6]), \
        how "f"(d[i + 7])
#define SUMS_32(how, d) SUMS_8(how, d, 0), SUMS_8(how, d, 8), SUMS_8(how, d, 16), SUMS_8(how, d, 24)
#define SUMS_40(how, d) SUMS_32(how, d), SUMS_8(how, d, 32)
#define SUMS_48(how, d) SUMS_40(how, d), SUMS_8(how, d, 40)
#define SUMS_56(how, d) SUMS_48(how, d), SUMS_8(how, d, 48)
#define SUMS_64(how, d) SUMS_56(how, d), SUMS_8(how, d, 56)
#define SUMS_96(how, d) SUMS_64(how, d), SUMS_8(how, d, 64), SUMS_8(how, d, 72), SUMS_8(how, d, 80), SUMS_8(how, d, 88)
#define SUMS_128(how, d) SUMS_96(how, d), SUMS_8(how, d, 96), SUMS_8(how, d, 104), SUMS_8(how, d, 112), SUMS_8(how, d, 120)
#define REGISTERS_32 REGISTERS_0 ", " REGISTERS_1 ", " REGISTERS_2 ", " REGISTERS_3
#define REGISTERS_40 REGISTERS_32 ", " REGISTERS_4
#define REGISTERS_48 REGISTERS_40 ", " REGISTERS_5
#define REGISTERS_56 REGISTERS_48 ", " REGISTERS_6
#define REGISTERS_64 REGISTERS_56 ", " REGISTERS_7
#define REGISTERS_96 REGISTERS_64 ", " REGISTERS_8 ", " REGISTERS_9 ", " REGISTERS_10 ", " REGISTERS_11
#define REGISTERS_128 REGISTERS_96 ", " REGISTERS_12 ", " REGISTERS_13 ", " REGISTERS_14 ", " REGISTERS_15

// d[64, N] = or += a[64, 16] b[16, N], one instruction of a warpgroup, not waited for. Sum i of a thread is of row 16 (warp of 4) +
// lane / 4 + 8 (i / 2 % 2) and column 8 (i / 4) + 2 (lane % 4) + i % 2. The macro takes N, N / 2, and the numbers of the operands
// after the sums.
template <int N> struct Wgmma;
#define WGMMA(N, HALF, A, A1, A2, A3, B)                                                                                             \
    template <> struct Wgmma<N> {                                                                                                    \
        /* d = a b from shared memory, both with k innermost; what d held is not read */                                             \
        static __device__ __forceinline__ void begin(float (&d)[N / 2], Matrix a, Matrix b) {                                        \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N                              \
                         "k16.f32.bf16.bf16 {" REGISTERS_##HALF "}, %" A ", %" A1 ", p, 1, 1, 0, 0;\n}"                              \
                         : SUMS_##HALF("=", d)                                                                                       \
                         : "l"(a), "l"(b)                                                                                            \
                         : "memory");                                                                                                \
        }                                                                                                                            \
        /* d += the same */                                                                                                          \
        static __device__ __forceinline__ void add(float (&d)[N / 2], Matrix a, Matrix b) {                                          \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #N                              \
                         "k16.f32.bf16.bf16 {" REGISTERS_##HALF "}, %" A ", %" A1 ", p, 1, 1, 0, 0;\n}"                              \
                         : SUMS_##HALF("+", d)                                                                                       \
                         : "l"(a), "l"(b)                                                                                            \
                         : "memory");                                                                                                \
        }                                                                                                                            \
        /* d += a b from shared memory, each operand with k innermost (0) or outermost (1) */                                        \
        template <int K_OUTSIDE_OF_A, int K_OUTSIDE_OF_B>                                                                            \
        static __device__ __forceinline__ void add_from(float (&d)[N / 2], Matrix a, Matrix b) {                                     \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #N                              \
                         "k16.f32.bf16.bf16 {" REGISTERS_##HALF "}, %" A ", %" A1 ", p, 1, 1, %" A2 ", %" A3 ";\n}"                  \
                         : SUMS_##HALF("+", d)                                                                                       \
                         : "l"(a), "l"(b), "n"(K_OUTSIDE_OF_A), "n"(K_OUTSIDE_OF_B)                                                  \
                         : "memory");                                                                                                \
        }                                                                                                                            \
        /* d += a b, a from registers (as mma_m16n8k16 has it, each warp its 16 rows), b from shared memory with n innermost */      \
        static __device__ __forceinline__ void add(float (&d)[N / 2], const unsigned* a, Matrix b) {                                 \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #N                              \
                         "k16.f32.bf16.bf16 {" REGISTERS_##HALF "}, {%" A ", %" A1 ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, 1;\n}"      \
                         : SUMS_##HALF("+", d)                                                                                       \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                                        \
                         : "memory");                                                                                                \
        }                                                                                                                            \
    };
WGMMA(64, 32, "32", "33", "34", "35", "36")
WGMMA(80, 40, "40", "41", "42", "43", "44")
WGMMA(96, 48, "48", "49", "50", "51", "52")
WGMMA(112, 56, "56", "57", "58", "59", "60")
WGMMA(128, 64, "64", "65", "66", "67", "68")
WGMMA(192, 96, "96", "97", "98", "99", "100")
WGMMA(256, 128, "128", "129", "130", "131", "132")
#endif

// By every warp of the consuming warpgroups, when no lane of it reads a stage any more; told to all BLOCKS blocks of a cluster that copy
// to the stage.
template <int BLOCKS = 1> __device__ __forceinline__ void release(Mbarrier* free) {
    __syncwarp();
    int lane = threadIdx.x % 32;
    if constexpr (BLOCKS > 1) {
        if (lane < BLOCKS) mbarrier_arrive_at(free, lane);
    } else {
        if (lane == 0) mbarrier_arrive(free);
    }
}
// Arrivals at such a barrier, of a block's own consumers.
#define RELEASES(consumers) ((consumers) * 4)

// Where wgmma finds an operand in a tile of panels [rows, 64]: its first element's address, and for an operand of more than 64
// columns with n innermost the bytes from panel to panel. Groups of 8 rows follow each other every 1024 bytes.
__device__ __forceinline__ Matrix matrix_at(const void* first, int panel_bytes) {
    return (Matrix)(shared_address(first) >> 4 & 0x3fff) | (Matrix)(panel_bytes >> 4) << 16 | (Matrix)(SWIZZLED_BYTES >> 4) << 32 |
           1ull << 62;
}

// d[64, N] = a[64 rows, D] b[N rows, D]^T: `a` in a tile of A_ROWS rows, at the first of its 64, `b` a tile of N rows.
template <int D, int N, int A_ROWS> __device__ __forceinline__ void product_nt(float (&d)[N / 2], const bf16* a, const bf16* b) {
    Matrix from_a = matrix_at(a, 0), from_b = matrix_at(b, 0);
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        // In units of 16 bytes; a row of a panel is 8 of them.
        Matrix next_a = from_a + k / 64 * A_ROWS * 8 + k % 64 / 8, next_b = from_b + k / 64 * N * 8 + k % 64 / 8;
        if (k == 0) Wgmma<N>::begin(d, next_a, next_b);
        else Wgmma<N>::add(d, next_a, next_b);
    }
}

// d[64, D] += a[64, K] b[K rows, D]: `a` packed in registers, `b` a tile of K rows.
template <int D, int K> __device__ __forceinline__ void product_nn(float (&d)[D / 2], const unsigned (&a)[K / 4], const bf16* b) {
    Matrix from_b = matrix_at(b, K * 128);
#pragma unroll
    for (int k = 0; k < K; k += 16) Wgmma<D>::add(d, a + k / 4, from_b + k * 8);
}

// Sums [64, N] as bf16 in the form of `a` above.
template <int N> __device__ __forceinline__ void pack_sums(unsigned (&to)[N / 2], const float (&sums)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) to[i] = pack_bf16(sums[2 * i], sums[2 * i + 1]);
}

// A tile of `rows` rows of the map from `token` on.
template <int D>
__device__ __forceinline__ void tile_load(bf16* to, const TensorMap* map, int rows, int head, int token, Mbarrier* barrier) {
#pragma unroll
    for (int dim = 0; dim < D; dim += 64) tensor_load(to + dim * rows, map, dim, head, token, barrier);
}

// Four lanes exchange words: what lane q had as word j, lane j has as word q.
__device__ __forceinline__ void exchange_words(unsigned (&word)[4]) {
    int lane = threadIdx.x % 4;
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j & step) continue;
            bool upper = lane & step;
            unsigned other = __shfl_xor_sync(0xffffffffu, upper ? word[j] : word[j + step], step);
            word[j] = upper ? other : word[j];
            word[j + step] = upper ? word[j + step] : other;
        }
}

// Row `lane / 4` of a warp's sums (HALF 0) or row 8 further (1) to `to`, D elements aligned to 16 bytes, times `factor`. The four
// lanes of a row exchange words so that each writes 16 bytes at once. Whole warps; rows that are not `here` are not written.
template <int D, int HALF>
__device__ __forceinline__ void store_row(bf16* to, const float (&sums)[D / 2], float factor, bool here) {
    int lane = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < D / 8; n += 4) { // blocks of 8 columns; of each a lane has word `lane`, lane q ends with block n + q
        unsigned word[4];
#pragma unroll
        for (int j = 0; j < 4; j++) word[j] = pack_bf16(sums[4 * (n + j) + 2 * HALF] * factor, sums[4 * (n + j) + 2 * HALF + 1] * factor);
        exchange_words(word);
        if (here) *(uint4*)(to + (n + lane) * 8) = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

// The same row of stored elements: work(x, y, i) with the two that belong to sums i and i + 1. Rows that are not `here` are zeros.
template <int D, int HALF, class Work> __device__ __forceinline__ void load_row(const bf16* from, bool here, Work work) {
    int lane = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < D / 8; n += 4) {
        uint4 all = here ? *(const uint4*)(from + (n + lane) * 8) : make_uint4(0, 0, 0, 0);
        unsigned word[4] = {all.x, all.y, all.z, all.w};
        exchange_words(word);
#pragma unroll
        for (int j = 0; j < 4; j++)
            work(__uint_as_float(word[j] << 16), __uint_as_float(word[j] & 0xffff0000u), 4 * (n + j) + 2 * HALF);
    }
}
