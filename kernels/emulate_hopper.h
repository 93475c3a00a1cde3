// hopper.cuh on the CPU. Included by it under TRIREME_EMULATE. Strict where the hardware is quiet:
//   a copy's bytes appear, as the block's order says, at once or when no thread can go on without them; from its start until then the
//   place holds NaN, so that a read without the barrier, and a copy into what is still read, show;
//   sums of products hold NaN from the product's issue until a wait that covers its group; the products read shared memory, as the
//   block's order says, at their issue or when no thread can go on before they end, so that an operand that comes late or goes early shows;
//   products without a wgmma.fence after the last wait, descriptors that differ between warps, a barrier that was not initialised,
//   more arrivals or bytes than a phase has, registers that the multiprocessor does not have, and copies into and arrivals at a block that
//   has ended end the program with a line;
//   threads that wait for ever end it as in emulate.h.
// Shared memory begins at an address that is no multiple of 1024, different from block to block.
#pragma once
#include <cstdint>
#include <map>

#define __grid_constant__

namespace emulate {
// What a TensorMap holds here: bf16, boxes [1, 3] in the order (dim, head, token), strides in bytes, 128-byte swizzle.
struct Map {
    uint64_t address;
    uint64_t sizes[3];
    uint64_t strides[2];
    uint32_t box[3];
};
static_assert(sizeof(Map) <= sizeof(TensorMap));
inline TensorMap encode(const Map& map) {
    TensorMap made{};
    memcpy(&made, &map, sizeof map);
    return made;
}

[[noreturn]] inline void refuse(const char* what) {
    fprintf(stderr, "emulate: block %d %d, thread %d: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what);
    abort();
}

constexpr unsigned short NOT_A_NUMBER = 0x7fff;
// The same for the blocks of a cluster.
inline unsigned window() { return 1024 + 16 * (1 + (n_block - cluster_rank) % 61); }
inline unsigned char* at_shared(unsigned address, size_t bytes, unsigned char* memory = shared_memory) {
    unsigned from = address - window();
    if (address < window() || from + bytes > shared_bytes) refuse("an address outside of the block's shared memory");
    return memory + from;
}
// The shared memory of a block of the cluster.
inline unsigned char* memory_of(int rank) {
    if (rank < 0 || rank >= cluster_size) refuse("a block that is not of this cluster");
    if (has_ended(rank)) refuse("the shared memory of a block that has ended");
    return cluster_blocks[rank].shared();
}
// The barrier in the place of this one in a block of the cluster.
inline Mbarrier* barrier_of(int rank, Mbarrier* barrier) {
    return (Mbarrier*)(memory_of(rank) + ((unsigned char*)barrier - shared_memory));
}
// The 128-byte swizzle of an address.
inline unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

// An mbarrier as it lies in its 8 bytes.
struct Phase {
    uint16_t n_arrivals;   // of a phase
    uint16_t missing;      // of this phase
    int32_t parity : 1, bytes : 31;
};
static_assert(sizeof(Phase) == 8);
// Those that were initialised, and whether the copy engine was told.
inline std::map<const void*, bool> barriers;
inline Phase& phase(Mbarrier* barrier) {
    if (!barriers.count(barrier)) refuse("an mbarrier that was not initialised");
    return *(Phase*)barrier;
}
inline void end_if_complete(Phase& phase) {
    if (phase.missing || phase.bytes) return;
    phase.parity = ~phase.parity;
    phase.missing = phase.n_arrivals;
}

// A copy under way to the shared memory of block `rank`, and that block's barrier.
struct TensorCopy {
    Map map;
    unsigned to;
    int from[3];
    int rank;
    Mbarrier* barrier;
};
inline std::vector<TensorCopy> tensor_copies;
// Calls `put` with the place of each element of the box and where it comes from: null outside of the matrix.
template <class Put> inline void each_element(const TensorCopy& copy, Put put) {
    unsigned at = copy.to;
    unsigned char* memory = memory_of(copy.rank);
    for (unsigned t = 0; t < copy.map.box[2]; t++)
        for (unsigned h = 0; h < copy.map.box[1]; h++)
            for (unsigned d = 0; d < copy.map.box[0]; d++, at += 2) {
                int64_t index[3] = {copy.from[0] + (int64_t)d, copy.from[1] + (int64_t)h, copy.from[2] + (int64_t)t};
                bool inside = true;
                for (int i = 0; i < 3; i++) inside &= index[i] >= 0 && index[i] < (int64_t)copy.map.sizes[i];
                uint64_t from = copy.map.address + index[0] * 2 + index[1] * copy.map.strides[0] + index[2] * copy.map.strides[1];
                put((unsigned short*)at_shared(swizzled(at), 2, memory), inside ? (const unsigned short*)from : nullptr);
            }
}
inline int box_bytes(const Map& map) { return map.box[0] * map.box[1] * map.box[2] * 2; }
inline void finish(const TensorCopy& copy) {
    each_element(copy, [](unsigned short* to, const unsigned short* from) { *to = from ? *from : 0; });
    Phase& of = phase(copy.barrier);
    of.bytes -= box_bytes(copy.map);
    end_if_complete(of);
}
// Ends one copy: the oldest, or the newest.
inline bool finish_a_copy() {
    if (tensor_copies.empty()) return false;
    size_t i = order.from_last ? tensor_copies.size() - 1 : 0;
    TensorCopy copy = tensor_copies[i];
    tensor_copies.erase(tensor_copies.begin() + i);
    finish(copy);
    return true;
}

// Sums of a warp that products under way add to.
struct Sums {
    float* of_lane[32];
    std::vector<float> values; // [16, n]
    int n, n_under_way;
};
struct Product {
    Matrix a, b;
    unsigned left[32][4]; // a's registers, lane by lane
    bool from_registers;
    bool k_outside_of_a, k_outside_of_b; // of rows of 64 columns, as against rows of 64 terms
    int accumulate;
    float* sums;      // of lane 0: which Sums
};
struct WarpProducts {
    std::vector<std::vector<Product>> committed;
    std::vector<Product> open;
    std::map<float*, Sums> sums;
    bool fenced = false, waits = false;
    size_t n_issued = 0;
};
inline std::vector<WarpProducts> products;
// Descriptors of a warpgroup's products in order, as the first warp to come gave them.
inline std::vector<std::vector<std::pair<Matrix, Matrix>>> issued;
inline std::vector<int> registers; // of a thread of each warpgroup
inline std::vector<Barrier> named;

inline float bf16_at(unsigned address) { return __uint_as_float((unsigned)*(unsigned short*)at_shared(swizzled(address), 2) << 16); }
inline void compute(const Product& product, Sums& sums) {
    int n = sums.n, rows = threadIdx.x / 32 % 4 * 16;
    float a[16][16];
    std::vector<float> b(16 * n);
    auto start = [](Matrix m) { return (unsigned)(m & 0x3fff) << 4; };
    auto panel = [](Matrix m) { return (unsigned)(m >> 16 & 0x3fff) << 4; };
    auto group = [](Matrix m) { return (unsigned)(m >> 32 & 0x3fff) << 4; };
    for (Matrix m : {product.b, product.from_registers ? product.b : product.a})
        if (m >> 62 != 1 || (m >> 49 & 7)) refuse("a descriptor without the 128-byte swizzle, or with a base offset");
    // Element (line, k) of an operand: row of a or column of b.
    auto at = [&](Matrix m, bool k_outside, int line, int k) {
        return bf16_at(k_outside ? start(m) + line / 64 * panel(m) + line % 64 * 2 + k / 8 * group(m) + k % 8 * 128
                                 : start(m) + line / 8 * group(m) + line % 8 * 128 + k * 2);
    };
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++) {
            unsigned word = product.left[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
            a[row][k] = product.from_registers ? __uint_as_float(k % 2 ? word & 0xffff0000u : word << 16)
                                               : at(product.a, product.k_outside_of_a, rows + row, k);
        }
    for (int k = 0; k < 16; k++)
        for (int j = 0; j < n; j++) b[k * n + j] = at(product.b, product.k_outside_of_b, j, k);
    if (!product.accumulate) std::fill(sums.values.begin(), sums.values.end(), 0.0f);
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < n; j++) sums.values[row * n + j] += a[row][k] * b[k * n + j];
}
// Lane's sum i as (row of 16, column).
inline int place(int lane, int i, int n) { return (lane / 4 + 8 * (i / 2 % 2)) * n + 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

// By each lane; the last lane to come does the warp's work.
inline void issue(int n, float* d, Matrix a, Matrix b, const unsigned* left, int accumulate, bool k_outside_of_a, bool k_outside_of_b) {
    static Product of[64];
    static float* sums_of[64][32];
    int warp_of = threadIdx.x / 32, lane = threadIdx.x % 32;
    Product& product = of[warp_of];
    sums_of[warp_of][lane] = d;
    if (left) memcpy(product.left[lane], left, 16);
    warp();
    if (lane) return warp();
    WarpProducts& mine = products[warp_of];
    if (!mine.fenced) refuse("a product without wgmma.fence after the last wait");
    auto& of_group = issued[warp_of / 4];
    std::pair<Matrix, Matrix> operands{left ? 0 : a, b};
    if (mine.n_issued == of_group.size()) of_group.push_back(operands);
    else if (of_group[mine.n_issued] != operands) refuse("descriptors differ between the warps of a group");
    mine.n_issued++;
    product.a = a, product.b = b, product.from_registers = left != nullptr, product.accumulate = accumulate, product.sums = d;
    product.k_outside_of_a = k_outside_of_a, product.k_outside_of_b = k_outside_of_b;
    auto [found, is_new] = mine.sums.insert({d, {}});
    Sums& sums = found->second;
    if (is_new) {
        sums.n = n;
        sums.values.assign(16 * n, NAN);
        sums.n_under_way = 0;
        memcpy(sums.of_lane, sums_of[warp_of], sizeof sums.of_lane);
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < n / 2; i++) {
                sums.values[place(l, i, n)] = sums.of_lane[l][i];
                sums.of_lane[l][i] = NAN;
            }
    }
    if (memcmp(sums.of_lane, sums_of[warp_of], sizeof sums.of_lane)) refuse("sums that belong to two products");
    sums.n_under_way++;
    if (!order.products_late) compute(product, sums);
    mine.open.push_back(product);
    warp();
}
inline void wait_products(size_t pending) {
    warp();
    if (threadIdx.x % 32) return warp();
    WarpProducts& mine = products[threadIdx.x / 32];
    mine.waits = order.products_late && mine.committed.size() > pending;
    block_on({[](const Wait& wait) { return !((const WarpProducts*)wait.at)->waits; }, &mine, 0});
    for (; mine.committed.size() > pending; mine.committed.erase(mine.committed.begin()))
        for (Product& product : mine.committed.front()) {
            Sums& sums = mine.sums.at(product.sums);
            if (order.products_late) compute(product, sums);
            if (--sums.n_under_way) continue;
            for (int l = 0; l < 32; l++)
                for (int i = 0; i < sums.n / 2; i++) sums.of_lane[l][i] = sums.values[place(l, i, sums.n)];
            mine.sums.erase(product.sums);
        }
    mine.fenced = false;
    warp();
}

// Lets one of those go on that wait for copies or products that are kept back: which, changes.
inline bool finish_something() {
    static unsigned noise;
    noise = noise * 1664525 + 1013904223;
    if (noise >> 31 && finish_a_copy()) return true;
    for (size_t i = 0; i < products.size(); i++) {
        WarpProducts& of = products[(i + (noise >> 16)) % products.size()];
        if (of.waits) return of.waits = false, true;
    }
    return finish_a_copy();
}

// Threads of a block of `threads` at most have this many registers each before setmaxnreg.
inline int registers_at_start() { return min(255, 65536 / blockDim.x / 8 * 8); }
inline void set_registers(int n, bool more) {
    int had = registers[threadIdx.x / WARPGROUP];
    int start = registers_at_start();
    if (n % 8 || n < 24 || n > 256 || (had == start && (more ? n < start : n > start)) || (had != start && had != n))
        refuse("setmaxnreg to a number that is not allowed");
    registers[threadIdx.x / WARPGROUP] = n;
    int all = 0;
    for (int i : registers) all += i * WARPGROUP;
    // Those that still have what they started with may give later.
    bool settled = std::count(registers.begin(), registers.end(), start) == 0;
    if (settled && all > 65536) refuse("more registers than there are");
}

inline void reset_hopper(int threads) {
    if (cluster_rank == 0) {
        barriers.clear();
        tensor_copies.clear();
    }
    products.assign((threads + 31) / 32, {});
    issued.assign((threads + WARPGROUP - 1) / WARPGROUP, {});
    registers.assign((threads + WARPGROUP - 1) / WARPGROUP, registers_at_start());
    named.assign(16, {});
}
// What is a block's own while the others of its cluster run.
struct OfBlock {
    std::vector<WarpProducts> products;
    std::vector<std::vector<std::pair<Matrix, Matrix>>> issued;
    std::vector<int> registers;
    std::vector<Barrier> named;
};
inline std::vector<OfBlock> of_blocks(MOST_IN_CLUSTER);
inline void change_hopper(int rank) {
    OfBlock& other = of_blocks[rank];
    products.swap(other.products);
    issued.swap(other.issued);
    registers.swap(other.registers);
    named.swap(other.named);
}
inline bool hooked = (at_start = reset_hopper, when_stuck = finish_something, change_places_too = change_hopper, true);
} // namespace emulate

inline unsigned shared_address(const void* at) {
    size_t from = (const unsigned char*)at - emulate::shared_memory;
    return emulate::window() + from;
}
inline unsigned char* aligned_shared(unsigned char* memory) { return memory + (0u - shared_address(memory)) % SWIZZLED_BYTES; }
inline float exp2_fast(float x) { return exp2f(x); }

inline void mbarrier_init(Mbarrier* barrier, int n_arrivals) {
    emulate::barriers[barrier] = false;
    *(emulate::Phase*)barrier = {(uint16_t)n_arrivals, (uint16_t)n_arrivals, 0, 0};
}
inline void mbarrier_init_done() {
    for (auto& [barrier, told] : emulate::barriers) told = true;
}
inline void mbarrier_arrive(Mbarrier* barrier) {
    emulate::Phase& phase = emulate::phase(barrier);
    if (phase.missing == 0) emulate::refuse("more arrivals than an mbarrier's phase has");
    phase.missing--;
    emulate::end_if_complete(phase);
}
inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
    emulate::phase(barrier).bytes += bytes;
    mbarrier_arrive(barrier);
}
inline void mbarrier_wait(Mbarrier* barrier, int parity) {
    emulate::phase(barrier);
    auto has_ended = [](const emulate::Wait& wait) { return (((const emulate::Phase*)wait.at)->parity & 1) != wait.value; };
    emulate::block_on({has_ended, barrier, parity});
}

inline void tensor_prefetch(const TensorMap*) {}
inline void tensor_hint(const TensorMap*, int, int, int) {}
inline void tensor_load(void* to, const TensorMap* map, int dim, int head, int token, Mbarrier* barrier, int rank) {
    emulate::TensorCopy copy{{}, shared_address(to), {dim, head, token}, rank, barrier};
    memcpy(&copy.map, map, sizeof copy.map);
    emulate::phase(barrier);
    if (!emulate::barriers[barrier]) emulate::refuse("the copy engine was not told of an mbarrier");
    if (copy.map.box[0] != 64 || copy.map.box[1] > 256 || copy.map.box[2] > 256) emulate::refuse("a box that is not allowed");
    if (copy.to % SWIZZLED_BYTES) emulate::refuse("a panel that does not begin at a multiple of 1024 bytes");
    if (copy.map.address % 16 || copy.map.strides[0] % 16 || copy.map.strides[1] % 16) emulate::refuse("a matrix off 16 bytes");
    emulate::each_element(copy, [](unsigned short* to, const unsigned short*) { *to = emulate::NOT_A_NUMBER; });
    if (emulate::order.copies_late) emulate::tensor_copies.push_back(copy);
    else emulate::finish(copy);
}
inline void tensor_load(void* to, const TensorMap* map, int dim, int head, int token, Mbarrier* barrier) {
    tensor_load(to, map, dim, head, token, barrier, emulate::cluster_rank);
}

inline int cluster_rank() { return emulate::cluster_rank; }
template <int BLOCKS> inline void cluster_wait() {
    if (gridDim.x % BLOCKS || BLOCKS > emulate::MOST_IN_CLUSTER) emulate::refuse("a grid that is not of whole clusters");
    emulate::cluster_size = BLOCKS;
    emulate::wait(emulate::cluster_barrier, BLOCKS * blockDim.x);
}
inline void mbarrier_arrive_at(Mbarrier* barrier, int rank) { mbarrier_arrive(emulate::barrier_of(rank, barrier)); }
template <int BLOCKS>
inline void tensor_load_to_all(void* to, const TensorMap* map, int dim, int head, int token, Mbarrier* barrier) {
    for (int rank = 0; rank < BLOCKS; rank++) tensor_load(to, map, dim, head, token, emulate::barrier_of(rank, barrier), rank);
}

template <int N> inline void registers_fewer() {
    emulate::warp();
    emulate::set_registers(N, false);
}
template <int N> inline void registers_more() {
    emulate::warp();
    emulate::set_registers(N, true);
}
inline void barrier_arrive(int id, int n) {
    emulate::Barrier& barrier = emulate::named.at(id);
    if (id == 0 || n % 32 || ++barrier.arrived > n) emulate::refuse("a named barrier with another number of threads");
    if (barrier.arrived == n) barrier = {0, barrier.generation + 1};
}
inline void barrier_wait(int id, int n) {
    int generation = emulate::named.at(id).generation;
    barrier_arrive(id, n);
    emulate::block_on({emulate::passed, &emulate::named[id], generation});
}

inline void wgmma_fence() {
    emulate::warp();
    emulate::products[threadIdx.x / 32].fenced = true;
}
inline void wgmma_commit() {
    emulate::warp();
    if (threadIdx.x % 32 == 0) {
        auto& mine = emulate::products[threadIdx.x / 32];
        mine.committed.push_back(std::move(mine.open));
        mine.open.clear();
    }
    emulate::warp();
}
template <int PENDING> inline void wgmma_wait() { emulate::wait_products(PENDING); }
template <int PENDING, int N> inline void wgmma_wait(float (&sums)[N]) {
    emulate::wait_products(PENDING);
    if (emulate::products[threadIdx.x / 32].sums.count(sums)) emulate::refuse("a wait that does not cover its sums"); // lane 0's
}
template <int N> struct Wgmma {
    static void begin(float (&d)[N / 2], Matrix a, Matrix b) { emulate::issue(N, d, a, b, nullptr, 0, false, false); }
    static void add(float (&d)[N / 2], Matrix a, Matrix b) { emulate::issue(N, d, a, b, nullptr, 1, false, false); }
    static void add(float (&d)[N / 2], const unsigned* a, Matrix b) { emulate::issue(N, d, 0, b, a, 1, false, true); }
    template <int K_OUTSIDE_OF_A, int K_OUTSIDE_OF_B> static void add_from(float (&d)[N / 2], Matrix a, Matrix b) {
        emulate::issue(N, d, a, b, nullptr, 1, K_OUTSIDE_OF_A, K_OUTSIDE_OF_B);
    }
};
