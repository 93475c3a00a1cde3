// A stand-in for libnccl.so.2 that really moves data, between processes of one machine through shared memory. Compiled together with
// the stand-in for CUDA (../kernels/stand_in.c), whose streams run what is put into them as late as the events allow.
// It is as strict as the header allows: a communicator does not block, is busy for a while after each call and takes no other then;
// both ends of a message must agree on size and type, and on whether it was captured into a graph and as which of the group's captured
// operations, so that ranks that do not launch the same graphs in the same order are seen; a group outlives its graphs; and sums are made
// in the order that STAND_IN_SUMS says (rank or reverse).
// Faults by the environment: STAND_IN_NCCL_VERSION=n, STAND_IN_FAIL=rank:n and STAND_IN_HANG=rank:n (after n operations of this rank
// of the world), STAND_IN_FAIL=rank:n:error (what fails, in the n-th call, is the rank's GPU, with this error of the
// driver).
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, UNHANDLED_CUDA = 1, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE = 6, IN_PROGRESS = 7 };
enum { F32 = 7, BF16 = 9 };
enum { MOST_RANKS = 8, ROOM = 1 << 16, MOST_ITEMS = 64, BUSY_LOOKS = 3, HEAD = 32 };

// Bytes on their way from one rank to another.
typedef struct {
    _Atomic size_t written, read;
    char bytes[ROOM];
} Channel;
typedef struct {
    _Atomic int arrived, left;
    Channel channels[MOST_RANKS][MOST_RANKS];
} Shared;
typedef struct {
    char name[96];
    Shared* shared;
    int rank, size, busy;
    _Atomic int failed, n_in_graphs;
    int n_captured; // so far
} Comm;
typedef struct {
    char bytes[128];
} Id;
typedef struct {
    size_t size;
    unsigned magic, version;
    int blocking, ints[3];
    const char* net;
    int split_share;
} Config;

// One end of a message, in a group. A head with size and type, and its place among captured ones, travels before the bytes.
typedef struct {
    int is_send, peer;
    size_t bytes, done;
    char head[HEAD];
    char* at;
} Item;
// What a stream runs: messages, then a sum or a copy.
typedef struct {
    Comm* comm;
    int n_items, n_pieces;
    Item items[MOST_ITEMS];
    char *temporary, *sum_to;
    size_t n;
    int type, is_captured;
} Job;

void stand_in_enqueue(void* stream, void (*run)(void*), void* job, void (*forget)(void*));
int stand_in_is_captured(void* stream);
void stand_in_break(int error);

static int parse(const char* name, int* n) {
    const char *text = getenv(name), *rank = getenv("OMPI_COMM_WORLD_RANK");
    int of_rank;
    return text && rank && sscanf(text, "%d:%d", &of_rank, n) == 2 && of_rank == atoi(rank);
}
static size_t size_of(int type) { return type == BF16 ? 2 : 4; }

int ncclGetVersion(int* version) {
    const char* text = getenv("STAND_IN_NCCL_VERSION");
    *version = text ? atoi(text) : 22707;
    return SUCCESS;
}
const char* ncclGetErrorString(int result) {
    return result == REMOTE ? "remote process exited or there was a network error"
         : result == INVALID_USAGE ? "invalid usage" : result == INVALID_ARGUMENT ? "invalid argument" : "unknown result";
}
const char* ncclGetLastError(Comm* comm) { return comm && comm->failed ? "the stand-in was told\nto fail" : ""; }
int ncclGetUniqueId(Id* id) {
    static int n;
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, 96, "/trireme-nccl-%d-%d", getpid(), n++);
    return SUCCESS;
}
int ncclCommInitRankConfig(Comm** comm, int size, Id id, int rank, Config* config) {
    if (config->size != 48 || config->magic != 0xcafebeef || config->blocking != 0 || size > MOST_RANKS) return INVALID_ARGUMENT;
    int file = shm_open(id.bytes, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof(Shared))) return REMOTE;
    *comm = calloc(1, sizeof(Comm));
    strcpy((*comm)->name, id.bytes);
    (*comm)->shared = mmap(0, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    (*comm)->rank = rank;
    (*comm)->size = size;
    // The last one takes the name away: nothing is left behind, whatever comes.
    if (++(*comm)->shared->arrived == size) shm_unlink(id.bytes);
    (*comm)->busy = BUSY_LOOKS;
    return IN_PROGRESS;
}
int ncclCommGetAsyncError(Comm* comm, int* state) {
    *state = comm->failed ? comm->failed : comm->shared->arrived < comm->size || (comm->busy > 0 && comm->busy--) ? IN_PROGRESS : SUCCESS;
    return SUCCESS;
}
int ncclCommAbort(Comm* comm) {
    fprintf(stderr, "stand-in: aborted\n");
    return SUCCESS;
}
// In progress until every rank has come here.
int ncclCommFinalize(Comm* comm) {
    if (comm->n_in_graphs) {
        fprintf(stderr, "stand-in: a communicator ends before its graphs\n");
        abort();
    }
    comm->shared->left++;
    comm->busy = BUSY_LOOKS;
    return IN_PROGRESS;
}
int ncclCommDestroy(Comm* comm) {
    munmap(comm->shared, sizeof(Shared));
    free(comm);
    return SUCCESS;
}

// Calls between start and end of a group belong to one job.
static int depth;
static Job* open_job;
static void* open_stream;
static Job* job_of(Comm* comm, void* stream) {
    if (!open_job) {
        open_job = calloc(1, sizeof(Job));
        open_job->comm = comm;
        open_job->is_captured = stand_in_is_captured(stream) ? ++comm->n_captured : 0;
        open_stream = stream;
    }
    return open_job;
}
static void item(Job* job, int is_send, int peer, const void* at, size_t n, int type) {
    Item* item = &job->items[job->n_items++];
    *item = (Item){.is_send = is_send, .peer = peer, .bytes = n * size_of(type), .at = (char*)at};
    snprintf(item->head, HEAD, "%zu of %d, %d", n, type, job->is_captured);
}

static size_t minimum(size_t a, size_t b) { return a < b ? a : b; }
// Bytes between memory and a channel, as many as go; the head first.
static int move(Channel* channel, Item* item) {
    size_t before = item->done, whole = item->bytes + HEAD;
    while (item->done < whole) {
        size_t written = channel->written, read = channel->read;
        size_t free_or_full = item->is_send ? ROOM - (written - read) : written - read;
        size_t at = (item->is_send ? written : read) % ROOM;
        int in_head = item->done < HEAD;
        size_t n = minimum(minimum(free_or_full, ROOM - at), in_head ? HEAD - item->done : whole - item->done);
        if (n == 0) break;
        if (item->is_send) {
            memcpy(channel->bytes + at, in_head ? item->head + item->done : item->at + item->done - HEAD, n);
            channel->written += n;
        } else {
            if (!in_head) memcpy(item->at + item->done - HEAD, channel->bytes + at, n);
            else if (memcmp(channel->bytes + at, item->head + item->done, n)) {
                fprintf(stderr, "stand-in: expected %s, another message came: %.*s\n", item->head, (int)n, channel->bytes + at);
                abort();
            }
            channel->read += n;
        }
        item->done += n;
    }
    return item->done > before;
}

static float widened(const char* at, size_t i, int type) {
    if (type == F32) return ((const float*)at)[i];
    unsigned bits = (unsigned)((const unsigned short*)at)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static void put(char* at, size_t i, int type, float x) {
    if (type == F32) { ((float*)at)[i] = x; return; }
    unsigned bits;
    memcpy(&bits, &x, 4);
    ((unsigned short*)at)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// With which the driver fails from the call that STAND_IN_FAIL names on; 0: what fails there is the network.
static int gpu_error(void) {
    int error;
    return sscanf(getenv("STAND_IN_FAIL"), "%*d:%*d:%d", &error) == 1 ? error : 0;
}
static _Atomic int n_started, n_asked;
static void run(void* whole) {
    Job* job = whole;
    Comm* comm = job->comm;
    int n, number = n_started++;
    if (parse("STAND_IN_FAIL", &n) && !gpu_error() && number >= n) comm->failed = REMOTE;
    int hangs = parse("STAND_IN_HANG", &n) && number >= n;
    while (comm->failed || hangs) usleep(1000);
    for (int i = 0; i < job->n_items; i++) job->items[i].done = 0;
    // Messages of one channel and direction go one after another, the channels side by side.
    for (int left = 1; left;) {
        int moved = 0;
        left = 0;
        for (int i = 0; i < job->n_items; i++) {
            Item* item = &job->items[i];
            int first = 1;
            for (int j = 0; j < i; j++)
                if (job->items[j].is_send == item->is_send && job->items[j].peer == item->peer && job->items[j].done < job->items[j].bytes + HEAD) first = 0;
            if (!first || item->done == item->bytes + HEAD) { left |= !first; continue; }
            moved |= move(item->is_send ? &comm->shared->channels[comm->rank][item->peer] : &comm->shared->channels[item->peer][comm->rank], item);
            left |= item->done < item->bytes + HEAD;
        }
        if (left && !moved) usleep(50);
    }
    int reverse = getenv("STAND_IN_SUMS") && !strcmp(getenv("STAND_IN_SUMS"), "reverse");
    for (size_t i = 0; job->n_pieces && i < job->n; i++) {
        float sum = 0;
        for (int r = 0; r < job->n_pieces; r++) {
            int piece = reverse ? job->n_pieces - 1 - r : r;
            float x = widened(job->temporary + piece * job->n * size_of(job->type), i, job->type);
            sum = r ? sum + x : x;
        }
        put(job->sum_to, i, job->type, sum);
    }
    if (job->is_captured) return; // until its graph ends
    free(job->temporary);
    free(job);
}
static void forget(void* whole) {
    Job* job = whole;
    job->comm->n_in_graphs--;
    free(job->temporary);
    free(job);
}

static int call(Comm* comm) {
    int n, number = n_asked++;
    if (parse("STAND_IN_FAIL", &n) && gpu_error() && number >= n) {
        stand_in_break(gpu_error());
        return comm->failed = UNHANDLED_CUDA;
    }
    if (comm->busy || comm->failed || comm->shared->arrived < comm->size) return INVALID_USAGE;
    return SUCCESS;
}
static int finish(Comm* comm) {
    comm->n_in_graphs += open_job->is_captured != 0;
    stand_in_enqueue(open_stream, run, open_job, forget);
    comm->busy = BUSY_LOOKS;
    open_job = 0;
    return IN_PROGRESS;
}
int ncclGroupStart(void) { depth++; return SUCCESS; }
int ncclGroupEnd(void) {
    if (--depth || !open_job) return SUCCESS;
    return finish(open_job->comm);
}
int ncclSend(const void* from, size_t n, int type, int peer, Comm* comm, void* stream) {
    if (call(comm) || peer >= comm->size) return INVALID_USAGE;
    item(job_of(comm, stream), 1, peer, from, n, type);
    return depth ? SUCCESS : finish(comm);
}
int ncclRecv(void* to, size_t n, int type, int peer, Comm* comm, void* stream) {
    if (call(comm) || peer >= comm->size) return INVALID_USAGE;
    item(job_of(comm, stream), 0, peer, to, n, type);
    return depth ? SUCCESS : finish(comm);
}
int ncclAllGather(const void* from, void* to, size_t n, int type, Comm* comm, void* stream) {
    if (call(comm)) return INVALID_USAGE;
    for (int peer = 0; peer < comm->size; peer++) {
        item(job_of(comm, stream), 1, peer, from, n, type);
        item(open_job, 0, peer, (char*)to + peer * n * size_of(type), n, type);
    }
    return finish(comm);
}
static int summed(const void* from, size_t step, void* to, size_t n, int type, int operation, Comm* comm, void* stream) {
    if (call(comm) || operation != 0 || (type != F32 && type != BF16)) return INVALID_USAGE;
    Job* job = job_of(comm, stream);
    job->temporary = malloc(comm->size * n * size_of(type) + 1);
    for (int peer = 0; peer < comm->size; peer++) {
        item(job, 1, peer, (const char*)from + peer * step * size_of(type), n, type);
        item(job, 0, peer, job->temporary + peer * n * size_of(type), n, type);
    }
    job->n_pieces = comm->size;
    job->sum_to = to;
    job->n = n;
    job->type = type;
    return finish(comm);
}
int ncclReduceScatter(const void* from, void* to, size_t n, int type, int operation, Comm* comm, void* stream) {
    return summed(from, n, to, n, type, operation, comm, stream);
}
int ncclAllReduce(const void* from, void* to, size_t n, int type, int operation, Comm* comm, void* stream) {
    return summed(from, 0, to, n, type, operation, comm, stream);
}
int ncclBroadcast(const void* from, void* to, size_t n, int type, int root, Comm* comm, void* stream) {
    if (call(comm)) return INVALID_USAGE;
    Job* job = job_of(comm, stream);
    for (int peer = 0; peer < comm->size && comm->rank == root; peer++)
        if (peer != root) item(job, 1, peer, from, n, type);
    if (comm->rank != root) item(job, 0, root, to, n, type);
    return finish(comm);
}
