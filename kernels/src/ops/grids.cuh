// What modules of integer grids share: rules, groups, the lanes that sums are kept apart in.
//
// The CPU keeps 16 lanes apart in its sums; here they are half a warp, whose lane l has the weights l, l + 16, … of a group.

#define LANES 16

// What the file allows, and which scales are tried.
struct Rules {
    int symmetric, precision;
    float max, half, min_zero;
    float from, to;
    int steps;
};

#define RULES_ARGUMENTS \
    int symmetric, int precision, float max_code, float half, float min_zero, float from, float to, int steps
#define RULES_OF_ARGUMENTS {symmetric, precision, max_code, half, min_zero, from, to, steps}

// Groups: those of columns start … of `columns` (of all, where that is null).
struct Group {
    const u32 *columns;
    int first, width;
    __device__ __forceinline__ int column(int i) const { return columns ? (int)columns[first + i] : first + i; }
};

__device__ __forceinline__ Group group_of(const u32 *columns, const u32 *starts, int group) {
    return {columns, (int)starts[group], (int)(starts[group + 1] - starts[group])};
}

__device__ __forceinline__ float code_of(float w, float inverse, float zero, float max) {
    return limited(nearest_integer(w * inverse) + zero, 0.0f, max);
}

// The grid that spans the range shrunk by `shrink`.
__device__ __forceinline__ void min_max(const Rules &rules, float low, float high, float shrink, float *scale, float *zero) {
    if (rules.symmetric) {
        *scale = round_scale(rules.precision, 2.0f * fmaxf(high, -low) * shrink / rules.max);
        *zero = rules.half;
    } else {
        *scale = round_scale(rules.precision, (high - low) * shrink / rules.max);
        *zero = limited(nearest_integer(-low * shrink * inverse_of(*scale)), rules.min_zero, rules.max);
    }
}

// Over half a warp, in the order of `sum_lanes`; in every lane.
__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step >>= 1) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}
__device__ __forceinline__ void range_lanes(float *low, float *high, int from) {
    for (int step = from; step > 0; step >>= 1) {
        *low = fminf(*low, __shfl_xor_sync(ALL_LANES, *low, step));
        *high = fmaxf(*high, __shfl_xor_sync(ALL_LANES, *high, step));
    }
}
