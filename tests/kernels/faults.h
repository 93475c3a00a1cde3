// A GPU that fails, by the environment: with STAND_IN_GPU_FAULT=n:error the n-th call that looks at the device and all after it give
// that error, as those of a broken GPU do, and cuBLASLt says that it failed; with STAND_IN_NO_MEMORY=n the n-th allocation finds no
// memory, and the next does. Where either is set, the end tells how many calls and allocations there were.
// stand_in_break(error) has the same effect from there on.
static int calls_made, allocations_made, broken_by;
void stand_in_break(int error) { broken_by = error; }
static int failing(void) {
    const char* text = getenv("STAND_IN_GPU_FAULT");
    int at, error, n = __sync_add_and_fetch(&calls_made, 1);
    return text && sscanf(text, "%d:%d", &at, &error) == 2 && n >= at ? error : broken_by;
}
static int has_no_memory(void) {
    const char* text = getenv("STAND_IN_NO_MEMORY");
    return __sync_add_and_fetch(&allocations_made, 1) == (text ? atoi(text) : 0);
}
static void tell_calls(void) {
    if (getenv("STAND_IN_GPU_FAULT") || getenv("STAND_IN_NO_MEMORY")) TELL("%d calls, %d allocations\n", calls_made, allocations_made);
}
#define FAULT do { int error = failing(); if (error) return error; } while (0)
