// A driver, a compiler and a matrix library that answer as CUDA's do and compute on the CPU, so that all that quantc says to a card
// can be tried where there is none. One file serves as libcuda, libnvrtc, libcublas and libcusolver.
//
// Work is done as late as CUDA may do it: when something waits for it, and in one stream no earlier because another has waited. Whoever
// reuses memory too early, or frees it, is found out.
// What the environment asks for: FAKE_CUDA_VERSION, FAKE_CUDA_DEVICES, FAKE_CUDA_CAPABILITY, FAKE_CUDA_MEMORY (bytes),
// FAKE_CUDA_TAKEN (bytes of it that others use), FAKE_CUDA_FRAGMENTS (memory that was given back serves no other size before the pool
// is trimmed), FAKE_CUDA_FAIL (a function), FAKE_CUDA_ERROR (what it returns) and FAKE_CUDA_AFTER (calls before it does),
// FAKE_CUDA_KERNELS (where on_cpu.h is), FAKE_CUDA_FOLDER (for compiled kernels), FAKE_CUDA_PIVOT (what the first Cholesky finds not
// positive), FAKE_CUDA_COMPILES (milliseconds that each module takes), FAKE_CUDA_COUNTS (a file for how often what was called). A
// function of a stream after the first is called by its name and the stream's number, as cuMemcpyHtoDAsync@1.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

typedef int (*Entry)(const unsigned *, unsigned, size_t, void **, int);

static std::recursive_mutex guard;
#define LOCKED std::lock_guard<std::recursive_mutex> locked(guard)

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

// How often each function was called; written when the process ends.
static struct Calls {
    std::map<std::string, long> of;
    ~Calls() {
        const char *path = getenv("FAKE_CUDA_COUNTS");
        FILE *file = path && !of.empty() ? fopen(path, "w") : nullptr;
        if (!file) return;
        for (auto &call : of) fprintf(file, "%s %ld\n", call.first.c_str(), call.second);
        fclose(file);
    }
} calls;

// What a call returns: an error if it is the one that is to fail.
static int outcome(const char *function) {
    long before = calls.of[function]++;
    const char *failing = getenv("FAKE_CUDA_FAIL");
    if (!failing || strcmp(failing, function)) return 0;
    return before >= setting("FAKE_CUDA_AFTER", 0) ? (int)setting("FAKE_CUDA_ERROR", 999) : 0;
}
#define TRY(function)                                   \
    LOCKED;                                             \
    if (int failed = outcome(function)) return failed

struct Work {
    uint64_t number;
    std::function<void()> run;
    // What it writes, where that is known.
    uint64_t to;
    size_t bytes;
};
struct Stream {
    size_t index;
    std::deque<Work> queue;
    uint64_t asked = 0;
};
struct Event {
    Stream *stream = nullptr;
    uint64_t number = 0;
    // When it was reached, of one that takes the time.
    std::shared_ptr<double> at;
};
static std::vector<Stream *> streams;
static std::map<void *, Event> events;
static std::map<uint64_t, size_t> memory;
static size_t used = 0;

// What the pool keeps of the memory that was given back, and whether the work before that is done.
struct Kept {
    size_t bytes;
    std::shared_ptr<bool> done;
};
static std::vector<Kept> kept;
static size_t kept_bytes = 0;
// Bytes that are left for something new.
static size_t left() {
    size_t total = setting("FAKE_CUDA_MEMORY", 2l << 30), gone = used + kept_bytes + setting("FAKE_CUDA_TAKEN", 0);
    return total > gone ? total - gone : 0;
}

static void enqueue(void *stream, std::function<void()> run, uint64_t to = 0, size_t bytes = 0) {
    Stream *in = (Stream *)stream;
    in->queue.push_back({++in->asked, std::move(run), to, bytes});
}
static void finish(Stream *stream, uint64_t until) {
    if (!stream) return;
    while (!stream->queue.empty() && stream->queue.front().number <= until) {
        auto run = std::move(stream->queue.front().run);
        stream->queue.pop_front();
        run();
    }
}
static void finish_all() {
    for (Stream *stream : streams) finish(stream, stream->asked);
}
static std::string in_stream(const char *function, void *stream) {
    size_t index = ((Stream *)stream)->index;
    return index ? std::string(function) + "@" + std::to_string(index) : function;
}

// A mistake of the caller's that a card would not forgive.
static void expect(bool right, const char *what) {
    if (right) return;
    fprintf(stderr, "fake CUDA: %s\n", what);
    abort();
}
static void expect_memory(uint64_t at, size_t bytes) {
    auto next = memory.upper_bound(at);
    expect(next != memory.begin() && bytes > 0, "memory that was never allocated");
    --next;
    expect(at + bytes <= next->first + next->second, "a copy beyond its memory");
}
// Gives memory back, which by then nothing may write any more.
static void give_back(uint64_t at, size_t bytes) {
    for (Stream *stream : streams) {
        for (auto &work : stream->queue) {
            expect(work.to + work.bytes <= at || at + bytes <= work.to, "memory is given back that a copy still writes");
        }
    }
    memset((void *)at, 0xff, bytes);
    free((void *)at);
}

extern "C" {

int cuDriverGetVersion(int *version) { *version = (int)setting("FAKE_CUDA_VERSION", 13000); return 0; }
int cuInit(unsigned) { return setting("FAKE_CUDA_DEVICES", 1) ? outcome("cuInit") : 100; }
int cuDeviceGetCount(int *count) { *count = (int)setting("FAKE_CUDA_DEVICES", 1); return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "Imaginary %d", device); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int) { *bytes = setting("FAKE_CUDA_MEMORY", 2l << 30); return 0; }
int cuDeviceGetAttribute(int *value, int which, int) {
    long capability = setting("FAKE_CUDA_CAPABILITY", 80);
    *value = which == 75 ? (int)(capability / 10) : which == 76 ? (int)(capability % 10) : which == 16 ? 4 : which == 115 ? 1 : 0;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int) { TRY("cuDevicePrimaryCtxRetain"); *context = (void *)16; return 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxSetCurrent(void *) { return 0; }
int cuCtxSynchronize() { LOCKED; finish_all(); return 0; }
int cuStreamCreate(void **stream, unsigned) {
    LOCKED;
    streams.push_back(new Stream{streams.size()});
    *stream = streams.back();
    return 0;
}
int cuStreamSynchronize(void *stream) { TRY("cuStreamSynchronize"); finish((Stream *)stream, ((Stream *)stream)->asked); return 0; }
int cuStreamWaitEvent(void *stream, void *event, unsigned) {
    TRY("cuStreamWaitEvent");
    // What counts is what was recorded by now.
    Event seen = events.at(event);
    enqueue(stream, [=] { finish(seen.stream, seen.number); });
    return 0;
}
int cuDeviceGetDefaultMemPool(void **pool, int) { *pool = (void *)48; return 0; }
int cuMemPoolSetAttribute(void *, int, void *) { return 0; }
int cuMemPoolTrimTo(void *, size_t) {
    TRY("cuMemPoolTrimTo");
    std::vector<Kept> rest;
    for (Kept &piece : kept) {
        if (*piece.done) kept_bytes -= piece.bytes;
        else rest.push_back(piece);
    }
    kept = rest;
    return 0;
}
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    LOCKED;
    *total = setting("FAKE_CUDA_MEMORY", 2l << 30);
    *free = left();
    return 0;
}
int cuMemAlloc_v2(uint64_t *at, size_t bytes) {
    TRY("cuMemAlloc");
    if (bytes == 0) return 1;
    if (bytes > left()) return 2;
    void *block = nullptr;
    if (posix_memalign(&block, 256, bytes)) return 2;
    // Memory is not cleared; what reads it finds NaN.
    memset(block, 0xff, bytes);
    *at = (uint64_t)block;
    memory[*at] = bytes;
    used += bytes;
    return 0;
}
int cuMemAllocAsync(uint64_t *at, size_t bytes, void *stream) {
    TRY(in_stream("cuMemAllocAsync", stream).c_str());
    for (size_t i = 0; i < kept.size(); i++) {
        if (kept[i].bytes == bytes) {
            kept_bytes -= bytes;
            kept.erase(kept.begin() + i);
            break;
        }
    }
    int failed = cuMemAlloc_v2(at, bytes);
    // A weight that is not finite is read again: of a copy that is not waited for, wrong numbers are to be seen.
    if (!failed && ((Stream *)stream)->index) memset((void *)*at, 0x3c, bytes);
    return failed;
}
int cuMemFree_v2(uint64_t at) {
    LOCKED;
    finish_all();
    expect(memory.count(at), "memory is freed that was never allocated");
    used -= memory[at];
    give_back(at, memory[at]);
    memory.erase(at);
    return 0;
}
int cuMemFreeAsync(uint64_t at, void *stream) {
    LOCKED;
    expect(memory.count(at), "memory is freed that was never allocated");
    // Others may have it once the work before is done; for accounting it is free at once, as with CUDA's pool.
    size_t bytes = memory[at];
    used -= bytes;
    memory.erase(at);
    auto done = std::make_shared<bool>(false);
    if (setting("FAKE_CUDA_FRAGMENTS", 0)) {
        kept.push_back({bytes, done});
        kept_bytes += bytes;
    }
    enqueue(stream, [=] {
        give_back(at, bytes);
        *done = true;
    });
    return 0;
}
int cuMemHostAlloc(void **at, size_t bytes, unsigned) { TRY("cuMemHostAlloc"); *at = malloc(bytes); return *at ? 0 : 2; }
int cuMemFreeHost(void *at) { free(at); return 0; }
int cuEventCreate(void **event, unsigned flags) {
    LOCKED;
    *event = malloc(1);
    events[*event] = Event();
    if (!(flags & 2)) events[*event].at = std::make_shared<double>(0);
    return 0;
}
int cuEventDestroy_v2(void *event) { LOCKED; events.erase(event); free(event); return 0; }
int cuEventRecord(void *event, void *stream) {
    LOCKED;
    auto at = events.at(event).at;
    if (at) {
        at = std::make_shared<double>(0);
        enqueue(stream, [=] { *at = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count(); });
    }
    events.at(event) = {(Stream *)stream, ((Stream *)stream)->asked, at};
    return 0;
}
int cuEventElapsedTime(float *milliseconds, void *start, void *end) {
    TRY("cuEventElapsedTime");
    Event from = events.at(start), to = events.at(end);
    if (!from.at || !to.at || !from.stream || !to.stream) return 400;
    if (*from.at == 0 || *to.at == 0) return 600;
    *milliseconds = (float)(*to.at - *from.at);
    return 0;
}
int cuEventSynchronize(void *event) {
    TRY("cuEventSynchronize");
    Event seen = events.at(event);
    finish(seen.stream, seen.number);
    return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    TRY(in_stream("cuMemcpyHtoDAsync", stream).c_str());
    expect_memory(to, bytes);
    enqueue(stream, [=] { memcpy((void *)to, from, bytes); }, to, bytes);
    return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    TRY("cuMemcpyDtoHAsync");
    expect_memory(from, bytes);
    enqueue(stream, [=] { memcpy(to, (void *)from, bytes); });
    return 0;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
    TRY("cuMemcpyDtoDAsync");
    expect_memory(to, bytes);
    expect_memory(from, bytes);
    enqueue(stream, [=] { memcpy((void *)to, (void *)from, bytes); }, to, bytes);
    return 0;
}
int cuMemsetD8Async(uint64_t at, unsigned char value, size_t bytes, void *stream) {
    TRY("cuMemsetD8Async");
    expect_memory(at, bytes);
    enqueue(stream, [=] { memset((void *)at, value, bytes); }, at, bytes);
    return 0;
}
int cuGetErrorString(int code, const char **text) {
    *text = code == 700 ? "an illegal memory access was encountered" : code == 214 ? "uncorrectable ECC error encountered" : code == 2 ? "out of memory" : "unknown error";
    return 0;
}

// An image is what the compiler below makes: the source, which the system's compiler takes on.
int cuModuleLoadData(void **module, const void *image) {
    TRY("cuModuleLoadData");
    std::string source = (const char *)image;
    std::string folder = getenv("FAKE_CUDA_FOLDER");
    char name[64];
    snprintf(name, sizeof name, "/%016zx", std::hash<std::string>()(source));
    std::string path = folder + name;
    void *library = dlopen((path + ".so").c_str(), RTLD_NOW);
    if (!library) {
        std::string own = path + std::to_string((size_t)&library) + ".cpp";
        FILE *file = fopen(own.c_str(), "w");
        expect(file, "the source cannot be written");
        fprintf(file, "#define QUANTC_ON_CPU\n%s", source.c_str());
        fclose(file);
        std::string command = "c++ -std=c++17 -O2 -ffp-contract=off -fno-strict-aliasing -fPIC -shared -w -I" + std::string(getenv("FAKE_CUDA_KERNELS")) +
                              " -o " + own + ".so " + own + " && mv " + own + ".so " + path + ".so";
        if (system(command.c_str())) return 218;
        library = dlopen((path + ".so").c_str(), RTLD_NOW);
    }
    *module = library;
    return library ? 0 : 218;
}

struct Function {
    Entry entry;
    int arguments;
    size_t shared;
};
int cuModuleGetFunction(void **function, void *module, const char *name) {
    LOCKED;
    void *entry = dlsym(module, (std::string("quantc_launch_") + name).c_str());
    void *count = dlsym(module, (std::string("quantc_arguments_") + name).c_str());
    if (!entry || !count) return 500;
    *function = new Function{(Entry)entry, ((int (*)())count)(), 48 << 10};
    return 0;
}
int cuFuncSetAttribute(void *function, int which, int value) {
    LOCKED;
    if (which != 8 || value > (99 << 10)) return 1;
    ((Function *)function)->shared = value;
    return 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned block, unsigned block_y, unsigned block_z, unsigned shared, void *stream,
                   void **arguments, void **) {
    TRY("cuLaunchKernel");
    Function *of = (Function *)function;
    if (!x || !y || !z || y > 65535 || z > 65535 || !block || block > 1024 || block_y != 1 || block_z != 1 || shared > of->shared) return 1;
    std::vector<uint64_t> values;
    for (int i = 0; i < of->arguments; i++) values.push_back(*(uint64_t *)arguments[i]);
    enqueue(stream, [=]() mutable {
        std::vector<void *> pointers;
        for (auto &value : values) pointers.push_back(&value);
        unsigned grid[3] = {x, y, z};
        expect(!of->entry(grid, block, shared, pointers.data(), 0), "threads wait for others that never come");
    });
    return 0;
}

// The compiler.
struct Program {
    std::string source, name;
};
static std::atomic<long> compiling;
int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }
const char *nvrtcGetErrorString(int) { return "an error"; }
int nvrtcGetNumSupportedArchs(int *count) { *count = 4; return 0; }
int nvrtcGetSupportedArchs(int *all) {
    int known[] = {75, 80, 90, 120};
    memcpy(all, known, sizeof known);
    return 0;
}
int nvrtcCreateProgram(void **program, const char *source, const char *name, int, const char **, const char **) {
    *program = new Program{source, name};
    return 0;
}
int nvrtcCompileProgram(void *program, int, const char **) {
    long at_work = ++compiling;
    std::this_thread::sleep_for(std::chrono::milliseconds(setting("FAKE_CUDA_COMPILES", 0)));
    --compiling;
    LOCKED;
    calls.of["compiled " + ((Program *)program)->name]++;
    long &most = calls.of["compiled at once"];
    if (at_work > most) most = at_work;
    return outcome("nvrtcCompileProgram");
}
int nvrtcGetProgramLogSize(void *, size_t *bytes) { *bytes = 1; return 0; }
int nvrtcGetProgramLog(void *, char *log) { *log = 0; return 0; }
int nvrtcGetCUBINSize(void *program, size_t *bytes) { *bytes = ((Program *)program)->source.size() + 1; return 0; }
int nvrtcGetCUBIN(void *program, char *image) { strcpy(image, ((Program *)program)->source.c_str()); return 0; }
int nvrtcGetPTXSize(void *program, size_t *bytes) { return nvrtcGetCUBINSize(program, bytes); }
int nvrtcGetPTX(void *program, char *image) { return nvrtcGetCUBIN(program, image); }
int nvrtcDestroyProgram(void **program) { delete (Program *)*program; return 0; }

// The matrix library, column by column.
int cublasCreate_v2(void **handle) { TRY("cublasCreate"); *handle = (void *)64; return 0; }
int cublasDestroy_v2(void *) { return 0; }
static void *library_stream;
int cublasSetStream_v2(void *, void *stream) { library_stream = stream; return 0; }
int cublasSetWorkspace_v2(void *, void *, size_t) { return 0; }
}

// Another shape, another kernel: terms are summed in so many parts, so that whoever promises equal bits asks for equal shapes.
static int parts_of(int m, int n, int k) { return 1 + (int)(((long)m * 31 + (long)n * 17 + k) % 3); }

template <class T, class In, T (*widen)(In)>
static void multiply(bool ta, bool tb, int m, int n, int k, T alpha, const void *a, int lda, const void *b, int ldb, T beta, void *c, int ldc) {
    int parts = parts_of(m, n, k);
    enqueue(library_stream, [=] {
        const In *left = (const In *)a, *right = (const In *)b;
        T *out = (T *)c;
        // A column of the result at a time, whose elements lie side by side and are each summed in the same order.
        std::vector<T> all((size_t)k * m), sums(m), some(m);
        for (int p = 0; p < k; p++)
            for (int i = 0; i < m; i++) all[(size_t)p * m + i] = widen(ta ? left[(size_t)i * lda + p] : left[(size_t)p * lda + i]);
        for (int j = 0; j < n; j++) {
            std::fill(sums.begin(), sums.end(), T(0));
            for (int part = 0; part < parts; part++) {
                std::fill(some.begin(), some.end(), T(0));
                for (int p = (int)((long)k * part / parts); p < (int)((long)k * (part + 1) / parts); p++) {
                    T y = widen(tb ? right[(size_t)p * ldb + j] : right[(size_t)j * ldb + p]);
                    const T *x = &all[(size_t)p * m];
                    T *to = some.data();
                    for (int i = 0; i < m; i++) to[i] += x[i] * y;
                }
                for (int i = 0; i < m; i++) sums[i] += some[i];
            }
            for (int i = 0; i < m; i++) {
                T &to = out[(size_t)j * ldc + i];
                to = alpha * sums[i] + (beta == 0 ? 0 : beta * to);
            }
        }
    });
}
static float from_single(float x) { return x; }
static double from_double(double x) { return x; }
static float from_rounded(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

extern "C" int cublasGemmEx(void *, int ta, int tb, int m, int n, int k, const float *alpha, const void *a, int a_type, int lda, const void *b,
                            int b_type, int ldb, const float *beta, void *c, int c_type, int ldc, int compute, int) {
    TRY("cublasGemmEx");
    expect(a_type == b_type && (a_type == 0 || a_type == 14) && c_type == 0 && compute == 68, "types of a product");
    expect(lda >= (ta ? k : m) && ldb >= (tb ? n : k) && ldc >= m, "strides of a product");
    if (a_type == 0) multiply<float, float, from_single>(ta, tb, m, n, k, *alpha, a, lda, b, ldb, *beta, c, ldc);
    else multiply<float, uint16_t, from_rounded>(ta, tb, m, n, k, *alpha, a, lda, b, ldb, *beta, c, ldc);
    return 0;
}
extern "C" int cublasDgemm_v2(void *, int ta, int tb, int m, int n, int k, const double *alpha, const double *a, int lda, const double *b, int ldb,
                              const double *beta, double *c, int ldc) {
    TRY("cublasDgemm");
    expect(lda >= (ta ? k : m) && ldb >= (tb ? n : k) && ldc >= m, "strides of a product");
    multiply<double, double, from_double>(ta, tb, m, n, k, *alpha, a, lda, b, ldb, *beta, c, ldc);
    return 0;
}

// Cholesky's factorization, column by column.
extern "C" int cusolverDnCreate(void **handle) { TRY("cusolverDnCreate"); *handle = (void *)128; return 0; }
extern "C" int cusolverDnDestroy(void *) { return 0; }
static void *solver_stream;
extern "C" int cusolverDnSetStream(void *, void *stream) { solver_stream = stream; return 0; }
extern "C" int cusolverDnDpotrf_bufferSize(void *, int, int n, double *, int lda, int *length) {
    expect(lda >= n, "stride of a factorization");
    *length = 3 * n;
    return 0;
}
extern "C" int cusolverDnDpotrf(void *, int uplo, int n, double *a, int lda, double *work, int length, int *info) {
    TRY("cusolverDnDpotrf");
    expect(uplo == 1, "the triangle of a factorization");
    expect_memory((uint64_t)work, 8 * (size_t)length);
    expect_memory((uint64_t)info, 4);
    static bool first = true;
    long pivot = first ? setting("FAKE_CUDA_PIVOT", 0) : 0;
    first = false;
    enqueue(solver_stream, [=] {
        *info = (int)pivot;
        for (int i = 0; i < length; i++) work[i] = -1e300;
        // A = Uᵀ U, U in the upper triangle; what is below stays. A pivot that is not a number is not told, and spreads.
        bool spoilt = false;
        for (int j = 0; j < n && !*info; j++) {
            for (int i = 0; i <= j; i++) {
                double sum = a[(size_t)j * lda + i];
                for (int k = 0; k < i; k++) sum -= a[(size_t)i * lda + k] * a[(size_t)j * lda + k];
                if (i < j) a[(size_t)j * lda + i] = sum / a[(size_t)i * lda + i];
                else if (sum <= 0) *info = j + 1;
                else a[(size_t)j * lda + j] = __builtin_sqrt(sum);
                spoilt |= std::isnan(sum);
            }
        }
        for (int j = 0; spoilt && !*info && j < n; j++)
            for (int i = 0; i <= j; i++) a[(size_t)j * lda + i] = __builtin_nan("");
    });
    return 0;
}
