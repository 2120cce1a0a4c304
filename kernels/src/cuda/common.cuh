// What all kernels share. NVRTC compiles it without any of CUDA's own headers; the system's C++ compiler compiles it over
// on_cpu.h, which gives a block its threads and barriers on the CPU.
//
// Nothing is fused unless fmaf says so (--fmad=false, -ffp-contract=off): where the CPU backend rounds twice, so do kernels, and
// codes agree.

#ifdef QUANTC_ON_CPU
#include "on_cpu.h"
#else
typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
// Defines a kernel: KERNEL(name)(arguments) { … } EXPORT(name)
#define KERNEL(name) extern "C" __global__ void name
#define EXPORT(name)
// Shared memory whose size the launch says, 16 bytes aligned.
#define SHARED_DYNAMIC(name) extern __shared__ __align__(16) unsigned char name[]
#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)

// Tensor cores and asynchronous copies, sm_80 and later; `on_cpu.h` says what each does. On older cards nothing calls them.
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void mma_bf16(float *d, const u32 *a, const u32 *b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void load_matrices(u32 *out, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void load_transposed(u32 *out, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void copy_async(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
#else
__device__ __forceinline__ void mma_bf16(float *, const u32 *, const u32 *) {}
__device__ __forceinline__ void load_matrices(u32 *, const void *) {}
__device__ __forceinline__ void load_transposed(u32 *, const void *) {}
__device__ __forceinline__ void copy_async(void *, const void *) {}
__device__ __forceinline__ void copy_commit() {}
template <int LEFT>
__device__ __forceinline__ void copy_wait() {}
#endif
#endif

#define WARP 32
#define ALL_LANES 0xffffffffu

// A value that is one of this many threads' in a grid of one dimension.
__device__ __forceinline__ i64 global_index() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ i64 global_stride() { return (i64)gridDim.x * blockDim.x; }

// bfloat16 as its bits; to nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ u16 to_bf16(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)((bits >> 16) | 0x40);
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
__device__ __forceinline__ float from_bf16(u16 x) { return __uint_as_float((u32)x << 16); }
// Two in one word, the first in the low half.
__device__ __forceinline__ u32 pack_bf16(float a, float b) {
#if !defined(QUANTC_ON_CPU) && __CUDA_ARCH__ >= 800
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    return both;
#else
    return (u32)to_bf16(a) | ((u32)to_bf16(b) << 16);
#endif
}

// IEEE half as its bits; to nearest, ties to even.
__device__ __forceinline__ u16 to_f16(float x) {
#ifdef QUANTC_ON_CPU
    return on_cpu::to_f16(x);
#else
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#endif
}
__device__ __forceinline__ float from_f16(u16 x) {
#ifdef QUANTC_ON_CPU
    return on_cpu::from_f16(x);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x));
    return value;
#endif
}

// The precisions that scales are stored in.
#define PRECISION_F16 0
#define PRECISION_BF16 1
#define PRECISION_F32 2
#define PRECISION_E4M3 3
#define PRECISION_E8M0 4

// The nearest value of E4M3, ties to the even code; beyond ±448 that.
__device__ __forceinline__ float round_e4m3(float x) {
    // Three bits of mantissa: values lie 2⁻³ of their power of two apart, at least 2⁻⁹.
    float quantum = fmaxf(__uint_as_float(__float_as_uint(x) & 0x7f800000u) * 0.125f, 0.001953125f);
    float value = rintf(x / quantum) * quantum;
    return value > 448.0f ? 448.0f : value < -448.0f ? -448.0f : value;
}

// The nearest value that the file can hold; finite input stays finite.
__device__ __forceinline__ float round_scale(int precision, float scale) {
    if (precision == PRECISION_F32) return scale;
    if (precision == PRECISION_E4M3) return round_e4m3(scale);
    if (precision == PRECISION_E8M0) {
        float positive = scale > 0.0f ? scale < 3.402823466e38f ? scale : 3.402823466e38f : 0.0f;
        u32 exponent = (__float_as_uint(positive) + (1u << 22)) >> 23;
        return __uint_as_float(exponent == 0 ? 1u << 22 : (exponent < 254 ? exponent : 254u) << 23);
    }
    if (precision == PRECISION_F16) {
        float limited = scale > 65504.0f ? 65504.0f : scale < -65504.0f ? -65504.0f : scale;
        return from_f16(to_f16(limited));
    }
    float limited = scale > 65280.0f ? 65280.0f : scale < -65280.0f ? -65280.0f : scale;
    float rounded = from_bf16(to_bf16(limited));
    // Below half's normal range bf16 keeps bits that half drops.
    return fabsf(rounded) < 6.1035156e-5f ? from_f16(to_f16(rounded)) : rounded;
}

// eˣ by the CPU backend's polynomial, to the bit.
__device__ __forceinline__ float exp_as_cpu(float x) {
    float clamped = fminf(fmaxf(x, -87.3f), 88.3f);
    // Keeps NaN, which the limits above would hide.
    clamped = x != x ? x : clamped;
    float n = rintf(clamped * 1.44269504f);
    float r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875692e-4f;
    p = p * r + 1.3982e-3f;
    p = p * r + 8.333452e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5e-1f;
    float y = p * r * r + r + 1.0f;
    float scaled = y * __int_as_float(((int)n + 127) << 23);
    return x < -87.3f ? 0.0f : scaled;
}

// 2ˣ to a few units in the last place, in one instruction; 0 where it would be subnormal.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef QUANTC_ON_CPU
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / scale, or 0 for a group that holds only zeros.
__device__ __forceinline__ float inverse_of(float scale) {
    float inverse = 1.0f / scale;
    return fabsf(inverse) < INFINITE ? inverse : 0.0f;
}

// The nearest integer, ties to the even one, without the slow conversion units: of sizes below 2^22; a larger value stays larger than
// whatever it is limited to afterwards. NaN stays NaN.
__device__ __forceinline__ float nearest_integer(float x) { return (x + 12582912.0f) - 12582912.0f; }

// Within limits; NaN stays NaN, as Rust's clamp leaves it.
__device__ __forceinline__ float limited(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// The levels of an encoding, as `level_set_of` packs them: from low to high evenly, where a code is level + offset; up to sixteen of a
// table, in order, and where one gives way to the next; or the values of E4M3.
#define LEVELS_TABLE 0
#define LEVELS_EVEN 1
#define LEVELS_FLOAT 2
struct LevelSet {
    int kind;
    float low, high, offset;
    float levels[16];
    float middles[15];
};

// The level nearest to `x`.
__device__ __forceinline__ float nearest_level(const LevelSet &set, float x) {
    if (set.kind == LEVELS_EVEN) return limited(nearest_integer(x), set.low, set.high);
    if (set.kind == LEVELS_FLOAT) return round_e4m3(x);
    float level = set.levels[0];
#pragma unroll
    for (int i = 0; i < 15; i++) level = x > set.middles[i] ? set.levels[i + 1] : level;
    return level;
}

// The byte that is kept of a level: its code, or of a table its place among the sorted levels.
__device__ __forceinline__ u32 kept_of(const LevelSet &set, float level) {
    if (set.kind == LEVELS_EVEN) return (u32)(int)(level + set.offset) & 255;
    if (set.kind == LEVELS_FLOAT) {
        float size = fabsf(level);
        u32 code = size < 0.015625f ? (u32)(int)(size * 512.0f) : (__float_as_uint(size) >> 20) - (120u << 3);
        return code | (__float_as_uint(level) >> 31 << 7);
    }
    u32 rank = 0;
#pragma unroll
    for (int i = 0; i < 15; i++) rank += level > set.middles[i] ? 1 : 0;
    return rank;
}

// The sum, or the largest, over a warp, in every lane; in one fixed order.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// The sum over a block, in every thread; `scratch` holds a value for each warp. The block is whole warps.
template <class T>
__device__ __forceinline__ T block_sum(T value, T *scratch) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    value = warp_sum(value);
    __syncthreads();
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    T total = 0;
    for (int i = 0; i < warps; i++) total += scratch[i];
    return total;
}
