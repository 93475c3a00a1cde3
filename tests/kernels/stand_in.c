// A stand-in for libcuda, libnvrtc and libcublasLt, as far as src/device/cuda calls them: device memory is the host's, a stream is a
// list of work that is done as late as the rules allow (when somebody waits for it), or at once for the streams named in STAND_IN_EAGER
// (a mask: 1 compute, 2 copies, 4 communication): a missing wait shows as wrong bytes in one of them. Copies and products are made,
// by plain loops, the latter in cuBLASLt's column-major terms; other kernels are run from the libraries that emulator.rs makes of
// them where STAND_IN_KERNELS names their folder, else their launch is told. Every call worth a look is a line of stderr.
// What is captured is as strict as the driver: it may be neither waited for nor asked about, no host memory is read or written, nothing is
// loaded or freed meanwhile, streams enter by an event of the capture and must have joined again at its end. Sizes of memory, launches and
// matrices that the driver's documentation excludes are refused.
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long long Address;
#define TELL(...) fprintf(stderr, "stand-in: " __VA_ARGS__)
enum { OUT_OF_MEMORY = 2, INVALID = 1, NOT_READY = 600, NOT_SUPPORTED = 801, UNSUPPORTED = 900, UNJOINED = 904, ISOLATION = 905, CAPTURED = 907 };
enum { MOST_STREAMS = 64 };
#include "faults.h"

// The driver: two GPUs.
static __thread void* current;
static int live, is_used;
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGetCount(int* n) { *n = 2; return 0; }
int cuDeviceGet(int* device, int ordinal) { TELL("GPU %d\n", ordinal); *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &live, is_used = 1; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
__attribute__((destructor)) static void at_the_end(void) {
    if (is_used) TELL("end with %d pieces of memory\n", live), tell_calls();
}
// Processors (as many as STAND_IN_PROCESSORS says), compute capability 9.0, bytes of L2; any other property is there.
enum { CACHE_BYTES = 4096 };
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    const char* processors = getenv("STAND_IN_PROCESSORS");
    *value = attribute == 16 ? processors ? atoi(processors) : 132 : attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 38 ? CACHE_BYTES : 1;
    return 0;
}
// Of each process alone, unless STAND_IN_ONE_GPU says that all share one.
int cuDeviceGetUuid_v2(char* uuid, int device) {
    memset(uuid, 0, 16);
    if (!getenv("STAND_IN_ONE_GPU")) snprintf(uuid, 16, "%d", getpid());
    return 0;
}
int cuDeviceGetName(char* name, int size, int device) { strcpy(name, "stand-in"); return 0; }
int cuCtxGetCurrent(void** context) { *context = current; return 0; }
int cuCtxSetCurrent(void* context) { current = context; return 0; }
int cuGetErrorName(int error, const char** text) { *text = error == 214 ? "CUDA_ERROR_ECC_UNCORRECTABLE" : "CUDA_ERROR"; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "an error"; return 0; }

// Streams: work in the order asked, done up to `n_done`. Several threads may ask; one at a time has the lock, which work that waits for
// other processes (stand_in_enqueue, for a stand-in of NCCL) gives away meanwhile.
typedef struct {
    void (*run)(void* data);
    long long data[32];
} Work;
typedef struct {
    Work* work;
    long n, n_done, room;
} List;
typedef struct Capture Capture;
typedef struct {
    List list;
    Capture* capture; // which records instead
    int number, may_block;
} Stream;
// In a capture: `of` is that, `at` counts the nodes of the stream, `seen` those of every stream that it comes after.
typedef struct {
    Stream* stream;
    long at;
    int tells_time;
    float time_ms;
    Capture* of;
    long seen[MOST_STREAMS];
} Event;
// A node waits for `at` nodes of stream `after`, or is work; `forget` ends what its owner keeps for it.
typedef struct {
    int stream, after;
    long at;
    Work work;
    void (*forget)(void*);
} Node;
struct Capture {
    Node* nodes;
    int n, room, origin, has_entered[MOST_STREAMS];
    int is_after_kernel[MOST_STREAMS], n_dependent; // kernels that may begin before the kernel they follow has ended
    long n_of[MOST_STREAMS], seen[MOST_STREAMS][MOST_STREAMS];
    Stream replayed[MOST_STREAMS]; // the streams of a launch but for the one it is launched into
};
// What is timed takes no time where its operands lie in the cache, which a fill of twice its size empties.
static float clock_ms;
static int is_evicted;
static void take(float ms) { clock_ms += is_evicted ? ms : 0, is_evicted = 0; }
static Stream streams[MOST_STREAMS];
static int n_streams, n_blocked, n_captures, n_launched, is_refused;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
#define LOCKED(...) do { pthread_mutex_lock(&lock); __VA_ARGS__; pthread_mutex_unlock(&lock); } while (0)
static void run_to(Stream* stream, long at) {
    List* list = &stream->list;
    while (list->n_done < at) {
        Work next = list->work[list->n_done]; // the list may move
        next.run(next.data);
        list->n_done++;
    }
}
static void append(List* list, Work work) {
    if (list->n == list->room) list->work = realloc(list->work, (list->room = 2 * list->room + 64) * sizeof(Work));
    list->work[list->n++] = work;
}
static Node* record(Stream* stream, Node node) {
    Capture* capture = stream->capture;
    if (capture->n == capture->room) capture->nodes = realloc(capture->nodes, (capture->room = 2 * capture->room + 64) * sizeof(Node));
    node.stream = stream->number;
    capture->seen[stream->number][stream->number] = ++capture->n_of[stream->number];
    capture->nodes[capture->n] = node;
    capture->is_after_kernel[stream->number] = 0;
    return &capture->nodes[capture->n++];
}
static void ask_locked(Stream* stream, void (*run)(void*), const void* data, size_t bytes) {
    Work work = {run};
    memcpy(work.data, data, bytes);
    if (stream->capture) {
        record(stream, (Node){.after = -1, .work = work});
        return;
    }
    append(&stream->list, work);
    const char* eager = getenv("STAND_IN_EAGER");
    if (eager && atoi(eager) >> stream->number & 1) run_to(stream, stream->list.n);
}
static void ask(Stream* stream, void (*run)(void*), const void* data, size_t bytes) { LOCKED(ask_locked(stream, run, data, bytes)); }
typedef struct { void (*run)(void*); void* of; } Blocking;
static void run_blocking(void* data) {
    Blocking* work = data;
    n_blocked++;
    pthread_mutex_unlock(&lock);
    work->run(work->of);
    pthread_mutex_lock(&lock);
    n_blocked--;
}
int stand_in_is_captured(Stream* stream) { return stream->capture != 0; }
void stand_in_enqueue(Stream* stream, void (*run)(void*), void* of, void (*forget)(void*)) {
    Blocking work = {run, of};
    stream->may_block = 1;
    ask(stream, run_blocking, &work, sizeof work);
    if (stream->capture) stream->capture->nodes[stream->capture->n - 1].forget = forget;
}
static void run_all(void) { for (int i = 0; i < n_streams; i++) run_to(&streams[i], streams[i].list.n); }
int cuCtxGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return 0; }
int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
    streams[n_streams].number = n_streams;
    TELL("stream %d of priority %d\n", n_streams, priority);
    *stream = &streams[n_streams++];
    return flags == 1 ? 0 : INVALID;
}
int cuStreamSynchronize(Stream* stream) { FAULT; LOCKED(run_to(stream, stream->list.n)); return stream->capture ? UNSUPPORTED : 0; }
int cuStreamDestroy_v2(Stream* stream) { return stream->list.n_done == stream->list.n ? 0 : INVALID; }
int cuEventCreate(Event** event, unsigned flags) { *event = calloc(1, sizeof(Event)); (*event)->tells_time = !flags; return 0; }
int cuEventDestroy_v2(Event* event) { free(event); return 0; }
static void stamp(void* event) { (*(Event**)event)->time_ms = clock_ms; }
int cuEventRecord(Event* event, Stream* stream) {
    FAULT;
    if (event->tells_time) ask(stream, stamp, &event, sizeof event);
    event->of = stream->capture;
    LOCKED(event->stream = stream; event->at = stream->list.n);
    if (stream->capture) memcpy(event->seen, stream->capture->seen[stream->number], sizeof event->seen);
    return current ? 0 : INVALID;
}
int cuEventElapsedTime_v2(float* ms, Event* from, Event* to) { *ms = to->time_ms - from->time_ms; return 0; }
static void wait_for(void* data) { Event* event = data; run_to(event->stream, event->at); }
typedef struct { Stream* stream; long at; } Point;
static void wait_for_point(void* data) { Point* point = data; run_to(point->stream, point->at); }
int cuStreamWaitEvent(Stream* stream, Event* event, unsigned flags) {
    FAULT;
    if (!event->of) {
        if (stream->capture) return ISOLATION;
        Point point = {event->stream, event->at};
        ask(stream, wait_for_point, &point, sizeof point);
        return 0;
    }
    if (event->of != event->stream->capture || stream->capture && stream->capture != event->of) return CAPTURED;
    stream->capture = event->of;
    stream->capture->has_entered[stream->number] = 1;
    long* seen = stream->capture->seen[stream->number];
    record(stream, (Node){.after = event->stream->number, .at = event->seen[event->stream->number]});
    for (int i = 0; i < MOST_STREAMS; i++) if (i != stream->number && event->seen[i] > seen[i]) seen[i] = event->seen[i];
    return 0;
}
int cuEventSynchronize(Event* event) { FAULT; if (event->of) return CAPTURED; LOCKED(wait_for(event)); return 0; }
// Done the next time it is asked, unless that might block.
int cuEventQuery(Event* event) {
    FAULT;
    int ready;
    if (event->of) return CAPTURED;
    LOCKED(ready = event->stream->list.n_done >= event->at; if (!n_blocked && !event->stream->may_block) wait_for(event));
    return ready ? 0 : NOT_READY;
}

// Graphs. A launch does the work of each stream of the capture on one of its own, the origin's on the one it is launched into.
void stand_in_refuse_captures(int refuse) { is_refused = refuse; }
int stand_in_launched(void) { return n_launched; }
int cuStreamBeginCapture_v2(Stream* stream, int mode) {
    if (is_refused) return NOT_SUPPORTED;
    if (mode != 2 || n_captures++) return INVALID; // relaxed: memory may be asked for
    stream->capture = calloc(1, sizeof(Capture));
    stream->capture->origin = stream->number;
    return 0;
}
int cuStreamEndCapture(Stream* stream, Capture** graph) {
    Capture* capture = stream->capture;
    int unjoined = 0;
    for (int i = 0; i < n_streams; i++) {
        if (capture->has_entered[i] && i != capture->origin) unjoined |= capture->seen[capture->origin][i] < capture->n_of[i];
        if (streams[i].capture == capture) streams[i].capture = 0;
    }
    n_captures--;
    *graph = capture;
    TELL("graph of %d calls, %d dependent\n", capture->n, capture->n_dependent);
    return unjoined || stream->number != capture->origin ? UNJOINED : 0;
}
int cuGraphInstantiateWithFlags(Capture** executable, Capture* graph, unsigned long long flags) {
    *executable = malloc(sizeof(Capture));
    **executable = *graph;
    return flags == 0 ? 0 : INVALID;
}
int cuGraphDestroy(Capture* graph) { free(graph); return 0; }
int cuGraphExecDestroy(Capture* executable) {
    TELL("graph ended\n");
    for (int i = 0; i < executable->n; i++)
        if (executable->nodes[i].forget) executable->nodes[i].forget(((Blocking*)executable->nodes[i].work.data)->of);
    free(executable->nodes);
    return 0; // launches under way still look at its streams
}
int cuGraphLaunch(Capture* executable, Stream* stream) {
    FAULT;
    TELL("graph launched\n");
    n_launched++;
    long begin[MOST_STREAMS];
    Point start = {stream, stream->list.n};
    for (int i = 0; i < MOST_STREAMS; i++) {
        Stream* on = i == executable->origin ? stream : &executable->replayed[i];
        on->number = i;
        on->may_block = 1;
        if (on != stream && executable->has_entered[i]) ask(on, wait_for_point, &start, sizeof start);
        begin[i] = on->list.n;
    }
    for (int i = 0; i < executable->n; i++) {
        Node* node = &executable->nodes[i];
        Stream* on = node->stream == executable->origin ? stream : &executable->replayed[node->stream];
        Stream* after = node->after == executable->origin ? stream : &executable->replayed[node->after < 0 ? 0 : node->after];
        Point point = {after, node->after < 0 ? 0 : begin[node->after] + node->at};
        if (node->after < 0) ask(on, node->work.run, node->work.data, sizeof node->work.data);
        else ask(on, wait_for_point, &point, sizeof point);
    }
    return 0;
}

// Memory.
// A TiB, or as many MiB as STAND_IN_MIB says. Copies and zeros lie within a piece, and what is freed is one.
static size_t used;
typedef struct { Address at; size_t bytes; } Piece;
static Piece* pieces;
static int n_pieces;
static int find(Address at, size_t bytes) {
    for (int i = 0; i < n_pieces; i++)
        if (at >= pieces[i].at && at + bytes <= pieces[i].at + pieces[i].bytes) return i;
    return -1;
}
static int is_memory(Address at, size_t bytes) {
    int found;
    LOCKED(found = find(at, bytes));
    return found >= 0;
}
static size_t most(void) { const char* mib = getenv("STAND_IN_MIB"); return mib ? (size_t)atoi(mib) << 20 : (size_t)1 << 40; }
int cuMemAlloc_v2(Address* at, size_t bytes) {
    FAULT;
    if (!current || !bytes) return INVALID;
    if (bytes + used > most() || has_no_memory()) return OUT_OF_MEMORY;
    char* all = aligned_alloc(512, (bytes + 1023) / 512 * 512);
    memset(all + 512, 0xff, bytes);
    LOCKED(pieces = realloc(pieces, (n_pieces + 1) * sizeof(Piece)); pieces[n_pieces++] = (Piece){(Address)all + 512, bytes});
    *at = (Address)all + 512;
    __sync_fetch_and_add(&used, bytes);
    __sync_fetch_and_add(&live, 1);
    TELL("%zu bytes of memory asked for\n", bytes);
    return 0;
}
int cuMemFree_v2(Address at) {
    FAULT;
    if (n_captures) return UNSUPPORTED;
    int i;
    size_t bytes = 0;
    LOCKED(run_all(); i = find(at, 0); if (i >= 0 && pieces[i].at == at) { bytes = pieces[i].bytes; pieces[i] = pieces[--n_pieces]; });
    if (!bytes) return INVALID;
    __sync_fetch_and_sub(&used, bytes);
    free((char*)at - 512);
    __sync_fetch_and_sub(&live, 1);
    return 0;
}
int cuMemHostAlloc(void** at, size_t bytes, unsigned flags) {
    if (n_captures) return UNSUPPORTED;
    TELL("%zu bytes page-locked\n", bytes);
    *at = aligned_alloc(4096, bytes);
    return 0;
}
int cuMemFreeHost(void* at) { free(at); return 0; }
typedef struct { Address to, from; size_t bytes; } Copy;
static void copy(void* data) { Copy* c = data; memcpy((void*)c->to, (void*)c->from, c->bytes); }
static int ask_copy(Address to, Address from, size_t bytes, Stream* stream) {
    Copy c = {to, from, bytes};
    ask(stream, copy, &c, sizeof c);
    return current ? 0 : INVALID;
}
int cuMemcpyHtoDAsync_v2(Address to, void* from, size_t bytes, Stream* stream) {
    FAULT;
    if (!is_memory(to, bytes)) return INVALID;
    return stream->capture ? UNSUPPORTED : ask_copy(to, (Address)from, bytes, stream);
}
int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Stream* stream) {
    FAULT;
    if (!is_memory(from, bytes)) return INVALID;
    return stream->capture ? UNSUPPORTED : ask_copy((Address)to, from, bytes, stream);
}
int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, Stream* stream) {
    FAULT;
    return is_memory(to, bytes) && is_memory(from, bytes) ? ask_copy(to, from, bytes, stream) : INVALID;
}
typedef struct { Address at; size_t bytes; int value; } Fill;
static void fill(void* data) {
    Fill* f = data;
    memset((void*)f->at, f->value, f->bytes);
    is_evicted |= f->bytes >= 2 * CACHE_BYTES;
}
int cuMemsetD8Async(Address at, unsigned char value, size_t bytes, Stream* stream) {
    FAULT;
    Fill f = {at, bytes, value};
    if (!is_memory(at, bytes)) return INVALID;
    ask(stream, fill, &f, sizeof f);
    return 0;
}

// Kernels.
// A kernel of an emulated library, as wrapper.h has it; no functions where there is none.
typedef struct { int blocks[3], threads; long long shared_bytes; void* args; } Packed;
typedef struct { void* (*pack)(void** args); void (*run)(const Packed* how); char name[80]; int shared_bytes; } Function;
typedef struct { void (*run)(const Packed* how); Packed how; float ms; int is_product; } Emulated;
static void emulated(void* data) {
    Emulated* e = data;
    e->run(&e->how);
    if (e->is_product) take(e->ms);
    else clock_ms += e->ms;
}
// Milliseconds of an emulated kernel: of the first name in STAND_IN_MS that its name begins with ("name=ms name=ms"), which is told;
// else a product of ours takes longer than any of the library's, and all others no time.
static float ms_of(const char* name) {
    for (const char* at = getenv("STAND_IN_MS"); at && *at; at = strchr(at, ' ') ? strchr(at, ' ') + 1 : 0) {
        size_t n = strcspn(at, "=");
        if (strncmp(name, at, n)) continue;
        TELL("kernel %s\n", name);
        return atof(at + n + 1);
    }
    return strncmp(name, "matmul_", 7) ? 0 : 99;
}
int cuModuleLoadData(void** module, const void* code) {
    FAULT;
    if (n_captures) return UNSUPPORTED;
    TELL("loaded %s\n", (const char*)code);
    const char* folder = getenv("STAND_IN_KERNELS");
    char path[1024];
    snprintf(path, sizeof path, "%s/%.*s.so", folder, (int)strcspn(code, "."), (const char*)code);
    *module = folder ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : 0;
    if (folder && !*module) TELL("%s\n", dlerror());
    return folder && !*module ? INVALID : 0;
}
int cuModuleUnload(void* module) { return 0; }
// One kernel stands for all of a module: what is not loaded with it would be loaded at its first use, in a capture too late.
static void* loaded_whole[32];
static int n_loaded_whole;
static int is_loaded_whole(void* module) {
    for (int i = 0; i < n_loaded_whole; i++) if (loaded_whole[i] == module) return 1;
    return 0;
}
int cuModuleGetFunctionCount(unsigned* n, void* module) { *n = 1; return 0; }
int cuModuleEnumerateFunctions(void** functions, unsigned n, void* module) { return n == 1 ? *functions = module, 0 : INVALID; }
int cuFuncLoad(void* function) {
    if (n_captures || n_loaded_whole == 32) return UNSUPPORTED;
    loaded_whole[n_loaded_whole++] = function;
    return 0;
}
int cuModuleGetFunction(Function** function, void* module, const char* name) {
    if (n_captures && !is_loaded_whole(module)) return UNSUPPORTED;
    *function = calloc(1, sizeof(Function));
    snprintf((*function)->name, sizeof (*function)->name, "%s", name);
    char of[100];
    snprintf(of, sizeof of, "pack_%s", name);
    if (module) (*function)->pack = dlsym(module, of);
    snprintf(of, sizeof of, "run_packed_%s", name);
    if (module) (*function)->run = dlsym(module, of);
    return module && !(*function)->run ? INVALID : 0;
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
    TELL("%s may share %d (%d)\n", function->name, value, attribute);
    function->shared_bytes = value;
    return attribute == 8 && value <= 227 << 10 ? 0 : INVALID;
}
// What sm_90 takes; more dynamic shared memory than 48 KiB must have been asked for.
static int is_accepted(const Function* of, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared) {
    unsigned most = of->shared_bytes > 48 << 10 ? of->shared_bytes : 48 << 10;
    return x && y && z && x < 1u << 31 && y < 1 << 16 && z < 1 << 16 && threads && threads <= 1024 && shared <= most;
}
// A matrix for the copy engine: all that was asked; in its place what emulate_hopper.h reads, the tokens of a box where no kernel runs.
typedef struct { Address at, sizes[3], strides[2]; unsigned box[3]; } Map;
int cuTensorMapEncodeTiled(Address* map, int type, unsigned rank, void* at, const Address* sizes, const Address* strides,
                           const unsigned* box, const unsigned* steps, int interleave, int swizzle, int promotion, int fill) {
    if (rank != 3 || (Address)at % 16 || (Address)map % 64 || steps[0] * steps[1] * steps[2] != 1) return INVALID;
    for (int i = 0; i < 3; i++) if (!sizes[i] || sizes[i] > 1ull << 32 || !box[i] || box[i] > 256) return INVALID;
    for (int i = 0; i < 2; i++) if (strides[i] % 16 || strides[i] >= 1ull << 40) return INVALID;
    if (strides[0] < 2 * sizes[0] || strides[1] % strides[0] || strides[1] < sizes[1] * strides[0]) return INVALID;
    if (type != 9 || interleave || swizzle != 3 || fill || 2 * box[0] > 128) return INVALID; // bf16, no wider than the swizzle
    TELL("matrix of type %d, %llu x %llu x %llu, strides %llu and %llu, boxes %u x %u x %u, %d %d %d %d\n", type, sizes[0], sizes[1],
         sizes[2], strides[0], strides[1], box[0], box[1], box[2], interleave, swizzle, promotion, fill);
    map[0] = box[2];
    if (getenv("STAND_IN_KERNELS"))
        *(Map*)map = (Map){(Address)at, {sizes[0], sizes[1], sizes[2]}, {strides[0], strides[1]}, {box[0], box[1], box[2]}};
    return 0;
}
typedef struct { float* x; long long n; float factor; } Scale;
static void scale(void* data) { Scale* s = data; for (long long i = 0; i < s->n; i++) s->x[i] *= s->factor; }
// Values combined in rank order: what collectives need beside messages.
typedef struct { char *out, *own, *pieces; int rank, n_pieces, is_bf16, is_max; long long stride, n; int in_pairs; } Combine;
static float widened(const void* at, long long i, int is_bf16) {
    if (!is_bf16) return ((const float*)at)[i];
    unsigned bits = (unsigned)((const unsigned short*)at)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static void store(void* at, long long i, float x, int is_bf16) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    if (is_bf16) ((unsigned short*)at)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    else ((float*)at)[i] = x;
}
static float piece(Combine* c, int r, long long i) {
    return widened(r == c->rank ? c->own : c->pieces + r * c->stride * (c->is_bf16 ? 2 : 4), i, c->is_bf16);
}
static float pairs(Combine* c, int first, int n, long long i) {
    return n == 1 ? piece(c, first, i) : pairs(c, first, n / 2, i) + pairs(c, first + n / 2, n / 2, i);
}
static void combine(void* data) {
    Combine* c = data;
    for (long long i = 0; i < c->n; i++) {
        float sum = 0;
        for (int r = 0; r < c->n_pieces; r++) {
            float x = piece(c, r, i);
            sum = r == 0 ? x : c->is_max ? (x > sum ? x : sum) : sum + x;
        }
        if (c->in_pairs) sum = pairs(c, 0, c->n_pieces, i);
        store(c->out, i, sum, c->is_bf16);
    }
}
// Without emulated libraries two kernels of elementwise.cu and those of ordered.cu are run. Of the others arguments 2.. are shown as two
// matrices, a table, two ints and a float: those of attention on Hopper.
typedef struct { int id; char pad[4]; union { char pad[64]; int allowed; } value; } Attribute;
typedef struct { unsigned x, y, z, threads, ty, tz, shared; Stream* stream; Attribute* attributes; unsigned n; } Config;
static int launch(Function* of, const Config* how, void** args);
// The attribute 6, programmatic stream serialization: in a capture an edge of its kind leads from kernel to kernel.
int cuLaunchKernelEx(const Config* how, Function* of, void** args, void** extra) {
    FAULT;
    if (how->n > 1 || how->n == 1 && (how->attributes->id != 6 || how->attributes->value.allowed != 1)) return INVALID;
    Capture* capture = how->stream->capture;
    if (capture && how->n) {
        if (!capture->is_after_kernel[how->stream->number]) return INVALID;
        capture->n_dependent++;
    }
    int failed = launch(of, how, args);
    if (capture) capture->is_after_kernel[how->stream->number] = 1;
    return failed;
}
static int launch(Function* of, const Config* how, void** args) {
    unsigned x = how->x, y = how->y, z = how->z, threads = how->threads, ty = how->ty, tz = how->tz, shared = how->shared;
    Stream* stream = how->stream;
    const char* function = of->name;
    if (!is_accepted(of, x, y, z, threads, shared)) return INVALID;
    if (of->run) {
        Emulated e = {of->run, {{x, y, z}, threads, shared, of->pack(args)}, ms_of(function), !strncmp(function, "matmul_", 7)};
        ask(stream, emulated, &e, sizeof e);
        return 0;
    }
    if (!strcmp(function, "copy_f32_f32")) return ask_copy(*(Address*)args[0], *(Address*)args[1], 4 * *(long long*)args[2], stream);
    if (!strcmp(function, "scale_f32")) {
        Scale s = {*(float**)args[0], *(long long*)args[1], *(float*)args[2]};
        ask(stream, scale, &s, sizeof s);
        return 0;
    }
    if (!strncmp(function, "ordered_", 8)) {
        Combine c = {*(char**)args[0], *(char**)args[1], *(char**)args[2], *(int*)args[3], *(int*)args[4], strstr(function, "bf16") != 0,
                     strstr(function, "max") != 0, *(long long*)args[5], *(long long*)args[6], strstr(function, "pairs") != 0};
        ask(stream, combine, &c, sizeof c);
        return 0;
    }
    TELL("%s on %u x %u x %u of %u x %u x %u, shares %u: %llu %llu %d %d %g\n", (char*)function, x, y, z, threads, ty, tz, shared,
         *(Address*)args[2], *(Address*)args[3], *(int*)args[5], *(int*)args[6], *(float*)args[7]);
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

#include "products.h"
