// Runs a kernel's source on the CPU: the threads of a block are fibers of one thread, blocks run one after another, warp
// instructions exchange through a buffer of their warp. All 32 lanes of a warp must reach a warp instruction together, as on
// the device with a full mask. Included by common.cuh under TRIREME_EMULATE.
// So that a missing barrier or wait shows as a wrong result, blocks differ in their order: threads from the first or from the last;
// warps side by side or any one as far ahead of the others as the barriers let it; cp.async at once or not before it is waited for. What
// a block publishes for others is not seen before its fence.
// A launch can be made in two parts, `begin` and `finish`: what its threads do before they wait for the work before it, and the rest. So
// what is read too early, and a wait that is missing, show too. The blocks of a cluster take turns whenever no thread of one can go on.
// Threads that wait for what nobody does end the program with a line.
// What depends on less than that (two lanes of a warp between two warp instructions) does not show. Nothing is said of speed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>
using std::max;
using std::min;
#ifndef __x86_64__
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
// One block runs at a time; those of a cluster, which take turns, have dynamic shared memory only.
#define __shared__ static
#define __cluster_dims__(...)
#define DYNAMIC_SHARED(name) unsigned char* name = emulate::shared_memory

struct Dim3 {
    int x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct alignas(8) float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {
inline unsigned char* shared_memory;
inline size_t shared_bytes;
// Threads that arrived, and how often all have.
struct Barrier {
    int arrived = 0, generation = 0;
};
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<unsigned long long> slots;
inline std::vector<bool> ended;
inline std::function<void()> body;

// How the threads of this block take turns.
struct Order {
    bool from_last, warp_by_warp, copies_late, products_late;
};
inline Order order;
inline unsigned n_launches, n_block;
// What a thread waits for; goes on once it is ready. Nothing: `ready` is null.
struct Wait {
    bool (*ready)(const Wait&);
    const void* at;
    int value;
};
inline std::vector<Wait> waits;
// Called before each block of n threads; when no thread can go on: true when that may have changed; when block `rank` of a cluster
// comes in or goes out. Null: nothing to do.
inline void (*at_start)(int);
inline bool (*when_stuck)();
inline void (*change_places_too)(int rank);
// cp.async of each thread: groups that were committed, the oldest first, and the one that is open.
struct Copy {
    void* to;
    const void* from;
};
struct Copies {
    std::vector<std::vector<Copy>> committed;
    std::vector<Copy> open;
};
inline std::vector<Copies> copies;

inline void entry();

// A fiber is where it stopped. On x86-64 a switch is a dozen instructions; swapcontext would ask the kernel twice each time.
constexpr size_t stack_bytes = 64 << 10;
#ifdef __x86_64__
using Fiber = void*;
// Keeps what a call must keep on this stack and its address in *from; goes on where `to` stopped.
__attribute__((naked, noinline)) static void change(Fiber* from, Fiber to) {
    asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
static void change(Fiber& from, Fiber& to) { change(&from, to); }
// Six kept words, the return into `entry`, and a word that no one returns to, which aligns the stack as a call does.
inline void prepare(Fiber& fiber, char* stack) {
    size_t top = ((size_t)stack + stack_bytes) / 16 * 16;
    void** word = (void**)top - 2;
    word[0] = (void*)entry;
    word[1] = nullptr;
    fiber = word - 6;
}
#else
using Fiber = ucontext_t;
static void change(Fiber& from, Fiber& to) { swapcontext(&from, &to); }
inline void prepare(Fiber& fiber, char* stack) {
    getcontext(&fiber);
    fiber.uc_stack.ss_sp = stack;
    fiber.uc_stack.ss_size = stack_bytes;
    makecontext(&fiber, entry, 0);
}
#endif
inline std::vector<Fiber> fibers;
inline Fiber scheduler;

inline void block_on(const Wait& wait) {
    int me = threadIdx.x;
    if (wait.ready(wait)) return;
    waits[me] = wait;
    change(fibers[me], scheduler);
    waits[me] = {};
}
inline bool passed(const Wait& wait) { return ((const Barrier*)wait.at)->generation != wait.value; }
inline void wait(Barrier& barrier, int n_threads) {
    int generation = barrier.generation;
    if (++barrier.arrived == n_threads) barrier = {0, generation + 1};
    block_on({passed, &barrier, generation});
}
inline void warp() { wait(warp_barriers[threadIdx.x / 32], 32); }
// What a thread publishes is not seen before its fence, or its end; nothing may come after the block was counted.
inline std::vector<std::vector<std::pair<float*, float>>> published;
inline bool is_counted;
inline std::vector<std::pair<float*, float>>& published_by_me() {
    if (published.size() <= threadIdx.x) published.resize(threadIdx.x + 1);
    return published[threadIdx.x];
}
inline void show_published() {
    if (is_counted && !published_by_me().empty()) {
        fprintf(stderr, "emulate: block %d %d, thread %d publishes what was counted already\n", blockIdx.x, blockIdx.y, threadIdx.x);
        abort();
    }
    for (auto [to, x] : published_by_me()) *to = x;
    published_by_me().clear();
}
inline void entry() {
    body();
    show_published();
    ended[threadIdx.x] = true;
    change(fibers[threadIdx.x], scheduler);
}

// Lets the threads first..first + n go on until each waits or has ended. False when none could.
inline bool run(int first, int n) {
    bool ran = false;
    for (int at = 0; at < n; at++) {
        int i = first + (order.from_last ? n - 1 - at : at);
        if (ended[i] || (waits[i].ready && !waits[i].ready(waits[i]))) continue;
        threadIdx = {i, 0, 0};
        change(scheduler, fibers[i]);
        ran = true;
    }
    return ran;
}

// Lets all go on as long as one can. False when none could.
inline bool run_threads(int threads) {
    int n_warps = (threads + 31) / 32;
    bool ran = false;
    if (!order.warp_by_warp) {
        while (run(0, threads)) ran = true;
        return ran;
    }
    // Any warp next, so that each is at times the one that is left behind.
    unsigned noise = n_block;
    for (int idle = 0, warp = 0; idle < n_warps; idle++) {
        int first = 32 * warp;
        while (run(first, min(32, threads - first))) idle = -1;
        ran |= idle < 0;
        if (idle < 0) noise = noise * 1664525 + 1013904223;
        warp = (idle < 0 ? noise >> 16 : warp + 1) % n_warps;
    }
    return ran;
}

// A block and all that is its own: the variables above while it runs, else here.
struct Block {
    std::unique_ptr<char[]> stacks;
    std::vector<unsigned char> memory;
    Dim3 at;
    unsigned number;
    Order order;
    Barrier barrier;
    std::vector<Barrier> warp_barriers;
    std::vector<unsigned long long> slots;
    std::vector<bool> ended;
    std::vector<Wait> waits;
    std::vector<Copies> copies;
    std::vector<Fiber> fibers;

    // Comes in where nothing is, goes out.
    void change_places() {
        std::swap(number, n_block);
        std::swap(at, blockIdx);
        std::swap(order, emulate::order);
        std::swap(barrier, block_barrier);
        warp_barriers.swap(emulate::warp_barriers);
        slots.swap(emulate::slots);
        ended.swap(emulate::ended);
        waits.swap(emulate::waits);
        copies.swap(emulate::copies);
        fibers.swap(emulate::fibers);
        shared_memory = shared();
    }
    unsigned char* shared() { return (unsigned char*)(((size_t)memory.data() + 15) / 16 * 16); }
};
// Blocks that see each other's shared memory: how many belong to a cluster, which a block says when it waits for the others, and where
// they are; which of them is in.
constexpr int MOST_IN_CLUSTER = 8;
inline int cluster_size, cluster_rank;
inline Block* cluster_blocks;
inline Barrier cluster_barrier;
inline bool has_ended(int rank) {
    const auto& all = rank == cluster_rank ? ended : cluster_blocks[rank].ended;
    return std::find(all.begin(), all.end(), false) == all.end();
}
// Calls work() with block `rank` of a cluster in.
template <class Work> inline void inside(Block* blocks, int rank, Work work) {
    cluster_blocks = blocks;
    cluster_rank = rank;
    blocks[rank].change_places();
    if (change_places_too) change_places_too(rank);
    work();
    if (change_places_too) change_places_too(rank);
    blocks[rank].change_places();
}
// Lets n blocks go on by turns as long as a thread can.
inline void run_blocks(int threads, Block* blocks, int n) {
    for (bool ran = true; ran;) {
        ran = false;
        for (int i = 0; i < n; i++) inside(blocks, i, [&] { ran |= run_threads(threads); });
        for (int i = 0; i < n && !ran; i++) inside(blocks, i, [&] { ran = when_stuck && when_stuck(); });
    }
}

// A launch that was begun; `kernel` calls the kernel with its arguments.
struct Launched {
    Dim3 grid;
    int threads;
    size_t shared;
    std::function<void()> kernel;
    std::vector<Block> blocks;

    void come_in() const {
        shared_bytes = shared;
        gridDim = grid;
        blockDim = {threads, 1, 1};
        body = kernel;
        cluster_size = 1;
    }
};

// Whether the work before has ended.
inline bool have_ended;

// A block at its beginning.
inline void set_up(const Launched& launch, Block& block, Dim3 at) {
    int threads = launch.threads;
    if (!block.stacks) block.stacks.reset(new char[threads * stack_bytes]); // not cleared
    // Filled with NaN, so that a read of what was never written shows.
    block.memory.assign(launch.shared + 16, 0xff);
    unsigned bits = n_block % 16 ^ n_block / 16 % 16; // each order within 16 blocks, in another sequence each time
    block.at = at;
    block.number = n_block;
    block.order = {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0};
    block.barrier = {};
    block.warp_barriers.assign((threads + 31) / 32, {});
    block.slots.assign(threads, 0);
    block.ended.assign(threads, false);
    block.waits.assign(threads, {});
    block.copies.assign(threads, {});
    block.fibers.resize(threads);
    for (int i = 0; i < threads; i++) prepare(block.fibers[i], block.stacks.get() + i * stack_bytes);
}
inline void check_end(const Block& block) {
    for (int i = 0; i < block.ended.size(); i++) {
        if (block.ended[i]) continue;
        fprintf(stderr, "emulate: block %d %d, thread %d waits for ever: what it waits for does not come\n", block.at.x, block.at.y, i);
        abort();
    }
}

// Lets the last of n blocks go on until it waits or has ended, the others, which wait for more of them, beside it. Whether no more
// blocks belong to them; then all have ended. What at_start sets up is as new, for nothing of it is used before the work before has ended.
inline bool go_on(const Launched& launch, Block* blocks, int n) {
    if (n == 1) cluster_barrier = {};
    is_counted = false;
    inside(blocks, n - 1, [&] {
        if (at_start) at_start(launch.threads);
    });
    run_blocks(launch.threads, blocks, n);
    if (n < cluster_size) return false;
    for (int i = 0; i < n; i++) check_end(blocks[i]);
    return true;
}

// Calls work(at) for each block of a grid.
template <class Work> inline void for_blocks(Dim3 grid, Work work) {
    n_block = n_launches++;
    for (int z = 0; z < grid.z; z++)
        for (int y = 0; y < grid.y; y++)
            for (int x = 0; x < grid.x; x++, n_block++) work(Dim3{x, y, z});
}
// The first part of a launch.
inline void begin(Launched& launch) {
    launch.come_in();
    have_ended = false;
    for_blocks(launch.grid, [&](Dim3 at) {
        launch.blocks.emplace_back();
        Block* block = &launch.blocks.back();
        set_up(launch, *block, at);
        inside(block, 0, [&] {
            if (at_start) at_start(launch.threads);
        });
        run_blocks(launch.threads, block, 1);
    });
}
// The second.
inline void finish(Launched& launch) {
    launch.come_in();
    have_ended = true;
    int n = 0; // that go on beside each other
    for (size_t i = 0; i < launch.blocks.size(); i++) n = go_on(launch, &launch.blocks[i - n], n + 1) ? 0 : n + 1;
    if (n > 0) check_end(launch.blocks.back());
}
// A whole launch.
inline void launch(Dim3 grid, int threads, size_t shared, std::function<void()> kernel) {
    Launched launch{grid, threads, shared, kernel};
    launch.come_in();
    have_ended = true;
    launch.blocks.resize(MOST_IN_CLUSTER);
    int n = 0;
    for_blocks(grid, [&](Dim3 at) {
        set_up(launch, launch.blocks[n], at);
        n = go_on(launch, launch.blocks.data(), n + 1) ? 0 : n + 1;
    });
    if (n > 0) check_end(launch.blocks[n - 1]);
}

// What lane `from` of this warp holds.
template <class T> inline T exchange(T value, int from) {
    int first = threadIdx.x / 32 * 32;
    slots[threadIdx.x] = 0;
    memcpy(&slots[threadIdx.x], &value, sizeof value);
    warp();
    T other;
    memcpy(&other, &slots[first + from], sizeof other);
    warp();
    return other;
}
} // namespace emulate

inline void __syncthreads() { emulate::wait(emulate::block_barrier, blockDim.x); }
inline void __syncwarp() { emulate::warp(); }
template <class T> inline T __shfl_xor_sync(unsigned, T x, int mask) { return emulate::exchange(x, (threadIdx.x % 32) ^ mask); }
template <class T> inline T __shfl_sync(unsigned, T x, int lane) { return emulate::exchange(x, lane); }
inline bool __all_sync(unsigned, bool yes) {
    int all = yes;
    for (int step = 16; step > 0; step /= 2) all &= emulate::exchange(all, (threadIdx.x % 32) ^ step);
    return all;
}
// One fiber runs at a time.
template <class T> inline T atomicAdd(T* to, T x) {
    T old = *to;
    *to += x;
    return old;
}
template <class T> inline T atomicMin(T* to, T x) {
    T old = *to;
    *to = min(old, x);
    return old;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline long long __double_as_longlong(double x) {
    long long bits;
    memcpy(&bits, &x, 8);
    return bits;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline unsigned round_bf16(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline unsigned pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
inline void cp_async_16(void* to, const void* from) {
    if (((size_t)to | (size_t)from) % 16) abort();
    if (emulate::order.copies_late) emulate::copies[threadIdx.x].open.push_back({to, from});
    else memcpy(to, from, 16);
}
inline void publish(float* to, float x) { emulate::published_by_me().push_back({to, x}); }
inline void device_fence() { emulate::show_published(); }
inline unsigned count_published(unsigned* counter) {
    emulate::is_counted = true;
    return (*counter)++;
}
inline float load_published(const float* from) { return *from; }
inline uint4 load_once(const void* from) {
    if ((size_t)from % 16) abort();
    uint4 all;
    memcpy(&all, from, sizeof all);
    return all;
}
inline void let_successor_come() {}
inline void wait_for_predecessors() {
    emulate::block_on({[](const emulate::Wait&) { return emulate::have_ended; }, nullptr, 0});
}
inline void hint_at(const void* at, int bytes) {
    if (((size_t)at | bytes) % 16 || bytes <= 0) abort();
}
inline void cp_async_commit() {
    emulate::Copies& mine = emulate::copies[threadIdx.x];
    mine.committed.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int N> inline void cp_async_wait() {
    auto& groups = emulate::copies[threadIdx.x].committed;
    for (; groups.size() > N; groups.erase(groups.begin()))
        for (auto& copy : groups.front()) memcpy(copy.to, copy.from, 16);
}

inline void ldmatrix_rows(unsigned r[4], const void* row, bool transposed) {
    if ((size_t)row % 16) abort();
    int base = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    memcpy(&emulate::slots[threadIdx.x], &row, sizeof row);
    emulate::warp();
    for (int i = 0; i < 4; i++) {
        unsigned half[2];
        for (int e = 0; e < 2; e++) {
            int at_row = transposed ? 2 * (lane % 4) + e : lane / 4, at_column = transposed ? lane / 4 : 2 * (lane % 4) + e;
            half[e] = ((const unsigned short*)emulate::slots[base + 8 * i + at_row])[at_column];
        }
        r[i] = half[0] | half[1] << 16;
    }
    emulate::warp();
}
inline void ldmatrix_x4(unsigned r[4], const void* row) { ldmatrix_rows(r, row, false); }
inline void ldmatrix_x4_trans(unsigned r[4], const void* row) { ldmatrix_rows(r, row, true); }

inline void mma_m16n8k16_bf16(float d[4], const unsigned a[4], const unsigned b[2]) {
    struct Fragments {
        unsigned a[4], b[2];
    };
    static Fragments of[1024];
    int base = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    memcpy(of[threadIdx.x].a, a, 16);
    memcpy(of[threadIdx.x].b, b, 8);
    emulate::warp();
    auto value = [](unsigned word, int half) { return __uint_as_float(half ? word & 0xffff0000u : word << 16); };
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 16; k++) {
            float x = value(of[base + row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)], k % 2);
            float y = value(of[base + column * 4 + k % 8 / 2].b[k / 8], k % 2);
            d[i] += x * y;
        }
    }
    emulate::warp();
}
