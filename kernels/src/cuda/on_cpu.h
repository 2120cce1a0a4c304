// CUDA's threads on one CPU thread: each thread of a block is a fiber, which runs until a barrier or a warp's exchange.
//
// It proves indexing and arithmetic where there is no card. Fibers run in an order that the caller chooses, so that a result that
// hangs on the order, for want of a barrier, differs from one run to the next. Whoever waits for threads that never come is told so.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tuple>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

typedef int8_t i8;
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef long long i64;

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __align__(n) __attribute__((aligned(n)))
#define INFINITE __builtin_inff()
#define NOT_A_NUMBER __builtin_nanf("")
#define SHARED_DYNAMIC(name) unsigned char *name = on_cpu::own().dynamic
#define KERNEL(name) static void name
#define EXPORT(name)                                                                                                     \
    extern "C" int quantc_launch_##name(const unsigned *grid, unsigned block, size_t shared, void **arguments, int order) { \
        return on_cpu::launch(name, grid, block, shared, arguments, order);                                              \
    }                                                                                                                    \
    extern "C" int quantc_arguments_##name() { return on_cpu::arguments(name); }

struct Dimensions {
    unsigned x, y, z;
};
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

#define threadIdx (on_cpu::own().thread)
#define blockIdx (on_cpu::own().block)
#define blockDim (on_cpu::own().threads)
#define gridDim (on_cpu::own().blocks)

namespace on_cpu {

enum State { RUNNING, AT_BLOCK, AT_WARP, DONE };
const size_t STACK = 256 << 10;
const int SLOT = 64;

struct Fiber {
#if defined(__x86_64__)
    void *pointer;
#else
    ucontext_t context;
#endif
    unsigned char *stack;
    State state;
    // Which of the two exchange buffers of its warp comes next, and how many exchanges it has seen.
    int turn;
    unsigned exchanges;
};

// Copies to shared memory that nothing has waited for.
struct Copy {
    void *to;
    const void *from;
};
struct Pending {
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};

struct Machine {
    Dimensions thread, block, threads, blocks;
#if defined(__x86_64__)
    void *scheduler;
#else
    ucontext_t scheduler;
#endif
    std::vector<Fiber> fibers;
    std::vector<unsigned char> slots;
    // Which exchange each slot was filled for.
    std::vector<unsigned> stamps;
    std::vector<unsigned char> shared;
    std::vector<Pending> pending;
    unsigned char *dynamic;
    unsigned count, current;
    void (*body)(void *);
    void *context;
    ~Machine() {
        for (auto &fiber : fibers) free(fiber.stack);
    }
};
static Machine &of_thread() {
    static thread_local Machine machine;
    return machine;
}

// The machine of the fiber that asks, which lies at the foot of its stack: whatever a kernel does asks for it, and a thread's own
// variables are found by a call in libraries that are loaded later.
static inline Machine &own() {
    return **(Machine **)((uintptr_t)__builtin_frame_address(0) & ~(uintptr_t)(STACK - 1));
}

#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void quantc_switch(void **from, void *to);
asm(".text\n.hidden quantc_switch\n.globl quantc_switch\n.type quantc_switch,@function\nquantc_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#endif

static void to_scheduler() {
    Machine &machine = own();
    Fiber &fiber = machine.fibers[machine.current];
#if defined(__x86_64__)
    quantc_switch(&fiber.pointer, machine.scheduler);
#else
    swapcontext(&fiber.context, &machine.scheduler);
#endif
}

static void begin() {
    Machine &machine = own();
    machine.body(machine.context);
    machine.fibers[machine.current].state = DONE;
    to_scheduler();
    abort();
}

static void prepare(Machine &machine, Fiber &fiber) {
    if (!fiber.stack) fiber.stack = (unsigned char *)aligned_alloc(STACK, STACK);
    *(Machine **)fiber.stack = &machine;
    fiber.state = RUNNING;
    fiber.turn = 0;
    fiber.exchanges = 0;
#if defined(__x86_64__)
    uintptr_t top = (uintptr_t)fiber.stack + STACK;
    void **frame = (void **)(top - 64);
    for (int i = 0; i < 6; i++) frame[i] = nullptr;
    frame[6] = (void *)begin;
    fiber.pointer = frame;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin, 0);
#endif
}

static void resume(Machine &machine, unsigned index) {
    machine.current = index;
    machine.thread = {index, 0, 0};
    Fiber &fiber = machine.fibers[index];
#if defined(__x86_64__)
    quantc_switch(&machine.scheduler, fiber.pointer);
#else
    swapcontext(&machine.scheduler, &fiber.context);
#endif
}

// A repeatable permutation of the threads: forwards, backwards, or scattered.
static unsigned nth(unsigned i, unsigned count, unsigned pass, int order) {
    if (order == 0) return i;
    if (order == 1) return count - 1 - i;
    unsigned step = 2 * ((pass * 7 + order) % 61) + 1;
    unsigned a = step, b = count;
    while (b) { unsigned rest = a % b; a = b; b = rest; }
    return a == 1 ? (unsigned)(((u64)i * step + pass) % count) : count - 1 - i;
}

static bool run_in_step(Machine &machine, int order) {
    for (unsigned i = 0; i < machine.count; i++) prepare(machine, machine.fibers[i]);
    machine.stamps.assign((size_t)2 * machine.count, 0);
    for (unsigned pass = 0;; pass++) {
        for (unsigned i = 0; i < machine.count; i++) {
            unsigned index = nth(i, machine.count, pass, order);
            if (machine.fibers[index].state == RUNNING) resume(machine, index);
        }
        bool released = false, live = false, all_at_block = true;
        for (unsigned first = 0; first < machine.count; first += 32) {
            unsigned end = first + 32 < machine.count ? first + 32 : machine.count;
            bool all_at_warp = true, some = false;
            for (unsigned i = first; i < end; i++) {
                State state = machine.fibers[i].state;
                if (state == DONE) continue;
                live = some = true;
                all_at_warp &= state == AT_WARP;
                all_at_block &= state == AT_BLOCK;
            }
            if (some && all_at_warp) {
                released = true;
                for (unsigned i = first; i < end; i++)
                    if (machine.fibers[i].state == AT_WARP) machine.fibers[i].state = RUNNING;
            }
        }
        if (!live) return true;
        if (all_at_block) {
            released = true;
            for (unsigned i = 0; i < machine.count; i++)
                if (machine.fibers[i].state == AT_BLOCK) machine.fibers[i].state = RUNNING;
        }
        if (!released) return false;
    }
}

// Each warp alone up to a barrier of the block, so that warps are as far apart as barriers let them be.
static bool run_apart(Machine &machine, int order) {
    for (unsigned i = 0; i < machine.count; i++) prepare(machine, machine.fibers[i]);
    machine.stamps.assign((size_t)2 * machine.count, 0);
    unsigned warps = (machine.count + 31) / 32, pass = 0;
    for (unsigned round = 0;; round++) {
        for (unsigned w = 0; w < warps; w++) {
            unsigned first = nth(w, warps, round, order) * 32, end = first + 32 < machine.count ? first + 32 : machine.count;
            for (;; pass++) {
                for (unsigned i = 0; i < end - first; i++) {
                    unsigned index = first + nth(i, end - first, pass, order);
                    if (machine.fibers[index].state == RUNNING) resume(machine, index);
                }
                bool warp = false, block = false;
                for (unsigned i = first; i < end; i++) {
                    warp |= machine.fibers[i].state == AT_WARP;
                    block |= machine.fibers[i].state == AT_BLOCK;
                }
                if (warp && block) return false;
                if (!warp) break;
                for (unsigned i = first; i < end; i++)
                    if (machine.fibers[i].state == AT_WARP) machine.fibers[i].state = RUNNING;
            }
        }
        bool live = false;
        for (unsigned i = 0; i < machine.count; i++)
            if (machine.fibers[i].state == AT_BLOCK) {
                live = true;
                machine.fibers[i].state = RUNNING;
            }
        if (!live) return true;
    }
}

// Orders from 16 on keep warps apart.
static bool run_block(Machine &machine, int order) {
    return order < 16 ? run_in_step(machine, order) : run_apart(machine, order - 16);
}

static void wait(State state) {
    Machine &machine = own();
    machine.fibers[machine.current].state = state;
    to_scheduler();
}

// Leaves `size` bytes where the other lanes of the warp see them, and waits for theirs; returns lane 0's.
static unsigned char *exchange(const void *value, size_t size) {
    Machine &machine = own();
    Fiber &fiber = machine.fibers[machine.current];
    unsigned char *base = machine.slots.data() + (size_t)fiber.turn * machine.count * SLOT;
    machine.stamps[(size_t)fiber.turn * machine.count + machine.current] = ++fiber.exchanges;
    fiber.turn ^= 1;
    memcpy(base + (size_t)machine.current * SLOT, value, size);
    unsigned warp = machine.current / 32 * 32;
    wait(AT_WARP);
    return base + (size_t)warp * SLOT;
}

// Whether a lane of the warp took part in the exchange that this thread has just come from; it may be done by now.
static bool took_part(unsigned index) {
    Machine &machine = own();
    Fiber &fiber = machine.fibers[machine.current];
    return machine.stamps[(size_t)(fiber.turn ^ 1) * machine.count + index] == fiber.exchanges;
}

template <class T>
static T from_lane(T value, unsigned lane) {
    Machine &machine = own();
    unsigned warp = machine.current / 32 * 32;
    unsigned char *all = exchange(&value, sizeof(T));
    if (warp + lane >= machine.count || !took_part(warp + lane)) return value;
    T other;
    memcpy(&other, all + (size_t)lane * SLOT, sizeof(T));
    return other;
}

template <class... A, size_t... I>
static int launch_with(void (*kernel)(A...), const unsigned *grid, unsigned block, size_t shared, void **arguments, int order,
                       std::index_sequence<I...>) {
    auto call = [&] { kernel(*(std::remove_reference_t<A> *)arguments[I]...); };
    Machine &machine = of_thread();
    machine.count = block;
    if (machine.fibers.size() < block) machine.fibers.resize(block, Fiber{});
    machine.slots.resize((size_t)2 * block * SLOT);
    machine.shared.resize(shared + 128);
    machine.dynamic = (unsigned char *)(((uintptr_t)machine.shared.data() + 127) & ~(uintptr_t)127);
    machine.context = &call;
    machine.body = [](void *context) { (*(decltype(call) *)context)(); };
    machine.threads = {block, 1, 1};
    machine.blocks = {grid[0], grid[1], grid[2]};
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                machine.block = {x, y, z};
                // What was never written reads as NaN.
                memset(machine.dynamic, 0xff, shared);
                if (!run_block(machine, order)) return 1;
            }
    return 0;
}

template <class... A>
static int arguments(void (*)(A...)) {
    return sizeof...(A);
}

template <class... A>
static int launch(void (*kernel)(A...), const unsigned *grid, unsigned block, size_t shared, void **arguments, int order) {
    return launch_with(kernel, grid, block, shared, arguments, order, std::index_sequence_for<A...>());
}

static inline u32 bits(float x) {
    u32 out;
    memcpy(&out, &x, 4);
    return out;
}
static inline float real(u32 x) {
    float out;
    memcpy(&out, &x, 4);
    return out;
}

static inline float from_f16(u16 half) {
    u32 sign = (u32)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) return real(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) return real(sign | bits((float)fraction * 0x1p-24f));
    return real(sign | (exponent + 112) << 23 | fraction << 13);
}
static inline u16 to_f16(float x) {
    u32 all = bits(x);
    u16 sign = all >> 16 & 0x8000;
    u32 size = all & 0x7fffffff;
    if (size > 0x7f800000) return sign | 0x7e00;
    if (size >= 0x477ff000) return sign | 0x7c00;
    if (size < 0x38800000) {
        // Subnormal: the sum rounds to a multiple of 2^-24.
        return sign | (u16)(bits(real(size) + 0.5f) - bits(0.5f));
    }
    size += 0xfff + (size >> 13 & 1);
    return sign | (u16)((size - 0x38000000) >> 13);
}

}  // namespace on_cpu

#define __syncthreads() on_cpu::wait(on_cpu::AT_BLOCK)
#define __syncwarp(...) on_cpu::wait(on_cpu::AT_WARP)
#define __threadfence_block() ((void)0)

template <class T>
static T __shfl_sync(unsigned, T value, int lane, int width = 32) {
    unsigned own = threadIdx.x % 32;
    return on_cpu::from_lane(value, own / width * width + (unsigned)lane % width);
}
template <class T>
static T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
    unsigned own = threadIdx.x % 32, other = own ^ mask;
    return on_cpu::from_lane(value, other / width == own / width ? other : own);
}
template <class T>
static T __shfl_down_sync(unsigned, T value, unsigned delta, int width = 32) {
    unsigned own = threadIdx.x % 32, other = own + delta;
    return on_cpu::from_lane(value, other / width == own / width ? other : own);
}
template <class T>
static T __shfl_up_sync(unsigned, T value, unsigned delta, int width = 32) {
    unsigned own = threadIdx.x % 32, other = own - delta;
    return on_cpu::from_lane(value, own % width >= delta ? other : own);
}
static inline unsigned __ballot_sync(unsigned, int predicate) {
    int value = predicate != 0;
    unsigned char *all = on_cpu::exchange(&value, sizeof value);
    unsigned result = 0, warp = on_cpu::own().current / 32 * 32;
    for (unsigned lane = 0; lane < 32 && warp + lane < on_cpu::own().count; lane++) {
        int other;
        memcpy(&other, all + (size_t)lane * on_cpu::SLOT, sizeof other);
        if (on_cpu::took_part(warp + lane) && other) result |= 1u << lane;
    }
    return result;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

static inline u32 __float_as_uint(float x) { return on_cpu::bits(x); }
static inline int __float_as_int(float x) { return (int)on_cpu::bits(x); }
static inline float __uint_as_float(u32 x) { return on_cpu::real(x); }
static inline float __int_as_float(int x) { return on_cpu::real((u32)x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
static inline T __ldg(const T *p) { return *p; }
template <class T>
static inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
static inline T max(T a, T b) { return a < b ? b : a; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
#define __expf expf

// A warp's product on tensor cores: d ← a b + d, `a` 16 × 16 row by row, `b` 16 × 8 column by column, bfloat16 into f32; which
// lane holds what is as PTX says of mma.m16n8k16.
static inline void mma_bf16(float *d, const u32 *a, const u32 *b) {
    u32 own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    unsigned char *all = on_cpu::exchange(own, sizeof own);
    auto value = [&](unsigned lane, int word, int half) {
        u32 pair;
        memcpy(&pair, all + (size_t)lane * on_cpu::SLOT + 4 * word, 4);
        return on_cpu::real((pair >> (16 * half) & 0xffff) << 16);
    };
    unsigned lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) {
        unsigned row = lane / 4 + (i >= 2 ? 8 : 0), col = 2 * (lane % 4) + i % 2;
        float sum = 0.0f;
        for (unsigned k = 0; k < 16; k++) {
            float left = value(row % 8 * 4 + k % 8 / 2, (row >= 8) + 2 * (k >= 8), k % 2);
            float right = value(col * 4 + k % 8 / 2, 4 + (k >= 8), k % 2);
            sum += left * right;
        }
        d[i] += sum;
    }
}
// Four 8 × 8 matrices of 16-bit values from shared memory, of which each lane names a row.
static inline void load_matrices(u32 *out, const void *row) {
    unsigned char *all = on_cpu::exchange(&row, sizeof row);
    unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned char *from;
        memcpy(&from, all + (size_t)(8 * i + lane / 4) * on_cpu::SLOT, sizeof from);
        memcpy(out + i, from + 4 * (lane % 4), 4);
    }
}
// The same, each matrix transposed.
static inline void load_transposed(u32 *out, const void *row) {
    unsigned char *all = on_cpu::exchange(&row, sizeof row);
    unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < 4; i++) {
        u16 pair[2];
        for (unsigned j = 0; j < 2; j++) {
            const unsigned char *from;
            memcpy(&from, all + (size_t)(8 * i + 2 * (lane % 4) + j) * on_cpu::SLOT, sizeof from);
            memcpy(pair + j, from + 2 * (lane / 4), 2);
        }
        out[i] = (u32)pair[0] | (u32)pair[1] << 16;
    }
}
// Copies 16 bytes to shared memory, no earlier than something waits for them.
namespace on_cpu {
static Pending &own_pending() {
    Machine &machine = own();
    if (machine.pending.size() < machine.count) machine.pending.resize(machine.count);
    return machine.pending[machine.current];
}
}  // namespace on_cpu
static inline void copy_async(void *to, const void *from) {
    memset(to, 0xff, 16);
    on_cpu::own_pending().open.push_back({to, from});
}
static inline void copy_commit() {
    auto &own = on_cpu::own_pending();
    own.groups.push_back(own.open);
    own.open.clear();
}
template <int LEFT>
static inline void copy_wait() {
    auto &own = on_cpu::own_pending();
    while (own.groups.size() > (size_t)LEFT) {
        for (auto &copy : own.groups.front()) memcpy(copy.to, copy.from, 16);
        own.groups.erase(own.groups.begin());
    }
}
