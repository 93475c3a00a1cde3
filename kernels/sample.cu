// One token a row of logits by inverse transform on the truncated distribution (infer::sampler): temperature, top-k, top-p, min-p, and
// noise that the launcher gives. Nothing is sorted: a wanted place in descending order is found digit by digit, in histograms of the
// elements that agree in the digits before (radix selection), until few are left, which are compared with each other. Weights are
// fixed-point numbers, exp((logit - max) / temperature) in units of 2^-40, so that sums of them are exact and atomics on them give the
// same bits in any order.
// Three launches. sample_max and sample_bins: grid (parts of a row, rows), 256 threads; the second 24 KiB of static shared memory.
// sample_choose: grid (rows), 512 threads, 35 KiB. Limited by exponentials in f64 (sample_bins, two an element) and by one multiprocessor's
// reads of the row (sample_choose): one for a draw and one for each of top-k, top-p and min-p, where few elements are as large as the one
// that is looked for; up to four in the place of one where many are.
#include "rows.cuh"

typedef unsigned long long u64;
constexpr int BINS = 2048;
constexpr int CHOOSE_THREADS = 512;
constexpr int MOST_LISTED = 256;
constexpr double ONE = 1099511627776.0; // 2^40: 2^22 weights fit 64 bits

// How a row is drawn from, made by the launcher.
struct Draw {
    double temperature; // 0: the largest
    double top_p;
    double min_p;
    double uniform; // in (0, 1)
    int top_k;      // 0: all
    int unused;
};
struct Drawn {
    double logprob;
    unsigned token;
    unsigned unused;
};

__device__ __forceinline__ u64 weight_of(float x, float max, double temperature) {
    return (u64)(exp(((double)x - (double)max) / temperature) * ONE + 0.5);
}
// The first digit: 64 bins a nat below the maximum, which spreads logits better than their bits; ascending bins are descending logits.
__device__ __forceinline__ int bin_of(float x, float max) { return (int)fminf((max - x) * 64.0f, (float)(BINS - 1)); }
// Larger for larger logits, -0 below 0.
__device__ __forceinline__ unsigned key_of(float x) {
    unsigned bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float of_key(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// maxima[T, parts] = largest of each part; what the launches behind it add to is empty: weights[T, BINS] and counts[T, BINS], and first[T].
template <class T>
__device__ __forceinline__ void sample_max(float* maxima, u64* weights, unsigned* counts, unsigned* first, const T* logits, int columns,
                                           int n_valid, int part_columns) {
    size_t row = blockIdx.y, bins = row * BINS;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < BINS; i += gridDim.x * blockDim.x) weights[bins + i] = 0, counts[bins + i] = 0;
    if (blockIdx.x == 0 && threadIdx.x == 0) first[row] = 0xffffffffu;
    int begin = blockIdx.x * part_columns;
    float largest = MINUS_INFINITY;
    for_row_chunks(min(part_columns, n_valid - begin), [&](int at, int left) {
        float x[CHUNK];
        load_chunk(x, logits + row * columns + begin + at, left);
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            if (i < left) largest = fmaxf(largest, x[i]);
    });
    largest = block_max(largest);
    if (threadIdx.x == 0) maxima[row * gridDim.x + blockIdx.x] = largest;
}

// The largest of a row, of its n_parts parts.
__device__ __forceinline__ float row_max(const float* maxima, int n_parts) {
    float largest = MINUS_INFINITY;
    for (int i = threadIdx.x; i < n_parts; i += blockDim.x) largest = fmaxf(largest, maxima[i]);
    return block_max(largest);
}

// weights[T, BINS] and counts[T, BINS] += the elements of each bin; first[T] = the first column of the maximum; partial[T, parts] = sum of
// exp(logit - max) of each part.
template <class T>
__device__ __forceinline__ void sample_bins(u64* weights, unsigned* counts, unsigned* first_of_max, double* partial, const T* logits,
                                            const float* maxima, const Draw* draws, int columns, int n_valid, int part_columns) {
    __shared__ u64 my_weights[BINS];
    __shared__ unsigned my_counts[BINS];
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) {
        my_weights[i] = 0;
        my_counts[i] = 0;
    }
    __syncthreads();
    const T* row = logits + (long long)blockIdx.y * columns;
    float most = row_max(maxima + (size_t)blockIdx.y * gridDim.x, gridDim.x);
    double temperature = draws[blockIdx.y].temperature, sum = 0;
    int first = blockIdx.x * part_columns, n = min(part_columns, n_valid - first);
    for_row_chunks(n, [&](int at, int left) {
        float x[CHUNK];
        load_chunk(x, row + first + at, left);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            if (i >= left) continue;
            sum += exp((double)x[i] - (double)most);
            if (x[i] == most) atomicMin(&first_of_max[blockIdx.y], (unsigned)(first + at + i));
            if (temperature == 0) continue;
            int bin = bin_of(x[i], most);
            atomicAdd(&my_weights[bin], weight_of(x[i], most, temperature));
            atomicAdd(&my_counts[bin], 1u);
        }
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[(size_t)blockIdx.y * gridDim.x + blockIdx.x] = sum;
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) {
        if (my_counts[i] == 0) continue;
        atomicAdd(&weights[(size_t)blockIdx.y * BINS + i], my_weights[i]);
        atomicAdd(&counts[(size_t)blockIdx.y * BINS + i], my_counts[i]);
    }
}

// A row as one block sees it.
template <class T> struct Row {
    const T* logits;
    int n;
    float max;
    double temperature;
    u64* weights; // in shared memory: histograms of the digits after the first
    unsigned* counts;
};

// What is summed up to a place.
enum Measure { BY_COUNT, BY_WEIGHT };

// The first bin at which the running sum of a measure reaches `need`; takes off `need` what comes before, adds its weight to `weight`.
__device__ __forceinline__ int find(const u64* weights, const unsigned* counts, Measure measure, u64& need, u64& weight) {
    __shared__ u64 sums[2][CHOOSE_THREADS];
    __shared__ u64 found_before;
    __shared__ int found;
    constexpr int EACH = BINS / CHOOSE_THREADS;
    u64 mine[EACH], sum = 0;
    for (int i = 0; i < EACH; i++) {
        int bin = threadIdx.x * EACH + i;
        mine[i] = measure == BY_COUNT ? counts[bin] : weights[bin];
        sum += mine[i];
    }
    // Running sums over the threads, each step over twice as many. Where nothing weighs anything, as in rows that are no numbers, bin 0.
    if (threadIdx.x == 0) found = 0, found_before = 0;
    int side = 0;
    sums[0][threadIdx.x] = sum;
    __syncthreads();
    for (int step = 1; step < CHOOSE_THREADS; step *= 2, side ^= 1) {
        u64 before = threadIdx.x >= step ? sums[side][threadIdx.x - step] : 0;
        sums[side ^ 1][threadIdx.x] = sums[side][threadIdx.x] + before;
        __syncthreads();
    }
    u64 running = sums[side][threadIdx.x] - sum;
    if (running < need && running + sum >= need) {
        int at = 0;
#pragma unroll
        for (int i = 0; i < EACH - 1; i++)
            if (at == i && running + mine[i] < need) {
                running += mine[i];
                at = i + 1;
            }
        found = threadIdx.x * EACH + at;
        found_before = running;
    }
    __syncthreads();
    int bin = found;
    u64 before = found_before, weight_before = 0;
    for (int i = threadIdx.x; i < bin; i += CHOOSE_THREADS) weight_before += weights[i];
    weight += block_sum(weight_before); // its barriers come before the next use of `found`
    need -= before;
    return bin;
}

// Fills the histograms with digit(x, column) of the elements for which it is not negative.
template <class T, class Digit> __device__ __forceinline__ void fill(const Row<T>& row, Digit digit) {
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += CHOOSE_THREADS) {
        row.weights[i] = 0;
        row.counts[i] = 0;
    }
    __syncthreads();
    for_row_chunks(row.n, [&](int at, int left) {
        float x[CHUNK];
        load_chunk(x, row.logits + at, left);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            int to = i < left ? digit(x[i], at + i) : -1;
            if (to < 0) continue;
            atomicAdd(&row.weights[to], weight_of(x[i], row.max, row.temperature));
            atomicAdd(&row.counts[to], 1u);
        }
    });
    __syncthreads();
}

// A place in descending order, that of one element.
struct Place {
    int column;
    u64 weight; // of all up to this one
};

// The column of the n-th element with this key, in the order of columns.
template <class T> __device__ __forceinline__ int column_of(const Row<T>& row, unsigned key, u64 n) {
    int shift = 0;
    while ((row.n - 1) >> shift >= BINS) shift++;
    fill(row, [&](float x, int column) { return key_of(x) == key ? column >> shift : -1; });
    u64 weight = 0;
    int column = find(row.weights, row.counts, BY_COUNT, n, weight) << shift;
    // The same few elements by every thread.
    for (;; column++) {
        n -= key_of(to_float(row.logits[column])) == key;
        if (n == 0) return column;
    }
}

// Of the few elements for which `is_left(x)`, in descending order and equal ones in that of their columns, the place at which the running
// sum of a measure reaches `need`; all before them weigh `weight`.
template <class T, class IsLeft>
__device__ __forceinline__ Place find_listed(const Row<T>& row, Measure measure, u64 need, u64 weight, IsLeft is_left) {
    __shared__ unsigned keys[MOST_LISTED];
    __shared__ int columns[MOST_LISTED], n;
    __shared__ Place place;
    if (threadIdx.x == 0) n = 0, place = Place{0, weight};
    __syncthreads();
    for_row_chunks(row.n, [&](int at, int left) {
        float x[CHUNK];
        load_chunk(x, row.logits + at, left);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            if (i >= left || !is_left(x[i])) continue;
            int to = atomicAdd(&n, 1);
            keys[to] = key_of(x[i]);
            columns[to] = at + i;
            row.weights[to] = weight_of(x[i], row.max, row.temperature);
        }
    });
    __syncthreads();
    if (threadIdx.x < n) {
        unsigned key = keys[threadIdx.x];
        int column = columns[threadIdx.x];
        u64 before = 0, n_before = 0, own = row.weights[threadIdx.x];
#pragma unroll 4
        for (int i = 0; i < n; i++) {
            bool is_before = keys[i] > key || (keys[i] == key && columns[i] < column);
            before += is_before ? row.weights[i] : 0;
            n_before += is_before;
        }
        u64 reached = measure == BY_COUNT ? n_before : before;
        if (reached < need && reached + (measure == BY_COUNT ? 1 : own) >= need) place = Place{column, weight + before + own};
    }
    __syncthreads();
    return place;
}

// The first place at which the running sum of a measure reaches `need`: its bin, the digits of its key while there are many elements that
// agree in them, and then those few. Many that have all digits alike are equal.
template <class T>
__device__ __forceinline__ Place descend(const Row<T>& row, const u64* weights, const unsigned* counts, Measure measure, u64 need) {
    u64 weight = 0;
    int bin = find(weights, counts, measure, need, weight), shift = 32;
    unsigned n_left = counts[bin], key = 0; // of which the bits from `shift` up are known
    auto is_left = [&](float x) { return bin_of(x, row.max) == bin && (shift == 32 || key_of(x) >> shift == key); };
    while (n_left > MOST_LISTED && shift > 0) {
        int width = shift == 10 ? 10 : 11, below = shift - width;
        unsigned mask = (1u << width) - 1;
        fill(row, [&](float x, int) { return is_left(x) ? (int)(~(key_of(x) >> below) & mask) : -1; });
        int digit = find(row.weights, row.counts, measure, need, weight);
        n_left = row.counts[digit];
        key = key << width | (~(unsigned)digit & mask);
        shift = below;
    }
    if (n_left <= MOST_LISTED) return find_listed(row, measure, need, weight, is_left);
    u64 each = weight_of(of_key(key), row.max, row.temperature);
    u64 n = measure == BY_COUNT ? need : (need + each - 1) / each;
    return Place{column_of(row, key, n), weight + n * each};
}

// The weight of all elements that weigh at least so much.
template <class T> __device__ __forceinline__ u64 weight_from(const Row<T>& row, u64 least) {
    u64 sum = 0;
    for_row_chunks(row.n, [&](int at, int left) {
        float x[CHUNK];
        load_chunk(x, row.logits + at, left);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            if (i >= left) continue;
            u64 weight = weight_of(x[i], row.max, row.temperature);
            if (weight >= least) sum += weight;
        }
    });
    return block_sum(sum);
}

template <class T>
__device__ __forceinline__ void sample_choose(Drawn* drawn, const T* logits, const float* maxima, const Draw* draws, const u64* all_weights,
                                              const unsigned* all_counts, const unsigned* first, const double* partial, int n_parts,
                                              int columns, int n_valid) {
    __shared__ u64 bin_weights[BINS];
    __shared__ unsigned bin_counts[BINS];
    const Draw& how = draws[blockIdx.x]; // not a copy: its registers would spill
    float max = row_max(maxima + (size_t)blockIdx.x * n_parts, n_parts);
    Row<T> row = {logits + (long long)blockIdx.x * columns, n_valid, max, how.temperature, bin_weights, bin_counts};
    int column;
    if (how.temperature == 0) {
        column = (int)min(first[blockIdx.x], (unsigned)(n_valid - 1)); // there is none where the maximum is no number
    } else {
        const u64* weights = all_weights + (size_t)blockIdx.x * BINS;
        const unsigned* counts = all_counts + (size_t)blockIdx.x * BINS;
        u64 total = 0;
        if (how.top_k > 0 && how.top_k < n_valid) {
            total = descend(row, weights, counts, BY_COUNT, (u64)how.top_k).weight;
        } else {
            for (int i = threadIdx.x; i < BINS; i += CHOOSE_THREADS) total += weights[i];
            total = block_sum(total);
        }
        if (how.top_p < 1) {
            u64 need = (u64)ceil(how.top_p * (double)total);
            total = descend(row, weights, counts, BY_WEIGHT, min(need == 0 ? 1 : need, total)).weight;
        }
        // What min-p keeps is a beginning of the same order.
        if (how.min_p > 0) total = min(total, weight_from(row, (u64)ceil(how.min_p * ONE)));
        u64 target = (u64)(how.uniform * (double)total);
        column = descend(row, weights, counts, BY_WEIGHT, min(target, total - 1) + 1).column;
    }
    if (threadIdx.x == 0) {
        double sum = 0;
        for (int i = 0; i < n_parts; i++) sum += partial[(size_t)blockIdx.x * n_parts + i];
        drawn[blockIdx.x] = Drawn{(double)to_float(row.logits[column]) - ((double)row.max + log(sum)), (unsigned)column, 0};
    }
}

#define KERNELS(T, name)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        sample_max_##name(float* maxima, u64* weights, unsigned* counts, unsigned* first, const T* logits, int columns, int n_valid, \
                          int part_columns) {                                                                                        \
        after_predecessors();                                                                                                        \
        sample_max(maxima, weights, counts, first, logits, columns, n_valid, part_columns);                                          \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        sample_bins_##name(u64* weights, unsigned* counts, unsigned* first, double* partial, const T* logits, const float* maxima,   \
                           const Draw* draws, int columns, int n_valid, int part_columns) {                                          \
        after_predecessors();                                                                                                        \
        sample_bins(weights, counts, first, partial, logits, maxima, draws, columns, n_valid, part_columns);                         \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(512, 1)                                                                             \
        sample_choose_##name(Drawn* drawn, const T* logits, const float* maxima, const Draw* draws, const u64* weights,              \
                             const unsigned* counts, const unsigned* first, const double* partial, int n_parts, int columns,         \
                             int n_valid) {                                                                                          \
        after_predecessors();                                                                                                        \
        sample_choose(drawn, logits, maxima, draws, weights, counts, first, partial, n_parts, columns, n_valid);                     \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
