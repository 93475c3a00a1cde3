// Between emulator.rs and the kernels of one file: `WRAPPED(name)` for each of its kernels, which unpacks the arguments of a
// launch by the types the kernel declares. A launch that passes another type is refused, as nothing would on the device.
#include <tuple>
#include <type_traits>
#include <utility>

// backend::Arg.
struct Argument {
    long long kind; // 0 pointer, 1 int, 2 long long, 3 float, 4 double, 5 TensorMap
    unsigned long long bits; // of a TensorMap: its address
};
// A launch as emulator.rs hands it over.
struct Launch {
    int blocks[3], threads;
    long long shared_bytes;
    const Argument* args;
    long long n_args;
};

// Of hopper.cuh, where a file includes it.
struct TensorMap;

static char complaint[256];

template <class T> static bool unpack(T& to, const Argument& from, int at) {
    constexpr int kind = std::is_pointer_v<T>            ? 0
                         : std::is_same_v<T, int>        ? 1
                         : std::is_same_v<T, long long>  ? 2
                         : std::is_same_v<T, float>      ? 3
                         : std::is_same_v<T, double>     ? 4
                         : std::is_same_v<T, TensorMap>  ? 5
                                                         : -1;
    static_assert(kind >= 0, "an argument of a kernel is a pointer, int, long long, float, double or TensorMap");
    static const char* const names[] = {"a pointer", "int", "long long", "float", "double", "a TensorMap"};
    if (from.kind != kind)
        snprintf(complaint, sizeof complaint, "argument %d is %s, the launch passes %s", at, names[kind], names[from.kind]);
    if (from.kind != kind) return false;
    memcpy(&to, kind == 5 ? (const void*)from.bits : &from.bits, sizeof to);
    return true;
}

// Calls `with` with what runs the kernel. Null, or what is wrong.
template <class With, class... Types, size_t... At>
static const char* unpacked(const Launch& how, void (*kernel)(Types...), std::index_sequence<At...>, With with) {
    if (how.n_args != sizeof...(Types)) {
        snprintf(complaint, sizeof complaint, "it has %zu arguments, the launch passes %lld", sizeof...(Types), how.n_args);
        return complaint;
    }
    std::tuple<Types...> args;
    if (!(unpack(std::get<At>(args), how.args[At], At) && ...)) return complaint;
    with([=]() mutable { kernel(std::get<At>(args)...); });
    return nullptr;
}
template <class... Types> static const char* run(const Launch& how, void (*kernel)(Types...)) {
    return unpacked(how, kernel, std::index_sequence_for<Types...>(), [&](std::function<void()> call) {
        emulate::launch({how.blocks[0], how.blocks[1], how.blocks[2]}, how.threads, how.shared_bytes, call);
    });
}
// Its first part; the rest by `finish`.
template <class... Types> static const char* begin(const Launch& how, emulate::Launched** begun, void (*kernel)(Types...)) {
    return unpacked(how, kernel, std::index_sequence_for<Types...>(), [&](std::function<void()> call) {
        *begun = new emulate::Launched{{how.blocks[0], how.blocks[1], how.blocks[2]}, how.threads, (size_t)how.shared_bytes, call};
        emulate::begin(**begun);
    });
}
extern "C" __attribute__((visibility("default"))) void finish(emulate::Launched* begun) {
    emulate::finish(*begun);
    delete begun;
}

// A launch as the driver gets it, without types: the arguments are taken out of what is pointed to, and run later. For stand_in.c.
struct Packed {
    int blocks[3], threads;
    long long shared_bytes;
    void* args;
};
template <class... Types, size_t... At>
static void* pack(void** from, void (*)(Types...), std::index_sequence<At...>) {
    return new std::tuple<Types...>(*(Types*)from[At]...);
}
template <class... Types> static void* pack(void** from, void (*kernel)(Types...)) {
    return pack(from, kernel, std::index_sequence_for<Types...>());
}
template <class... Types> static void run_packed(const Packed& how, void (*kernel)(Types...)) {
    emulate::launch({how.blocks[0], how.blocks[1], how.blocks[2]}, how.threads, how.shared_bytes,
                    [&] { std::apply(kernel, *(std::tuple<Types...>*)how.args); });
}

// Null when it ran, else why it cannot.
#define WRAPPED(name)                                                                                                                \
    extern "C" __attribute__((visibility("default"))) const char* launch_##name(const Launch* how) { return run(*how, name); }       \
    extern "C" __attribute__((visibility("default"))) const char* begin_##name(const Launch* how, emulate::Launched** begun) {       \
        return begin(*how, begun, name);                                                                                             \
    }                                                                                                                                \
    extern "C" __attribute__((visibility("default"))) void* pack_##name(void** args) { return pack(args, name); }                    \
    extern "C" __attribute__((visibility("default"))) void run_packed_##name(const Packed* how) { run_packed(*how, name); }
