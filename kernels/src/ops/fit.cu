// Scales and zeros of integer grids, and codes on them: what fit.rs, round.rs and scaled.rs do, to the bit.
//
// Groups of up to 128 weights lie in registers, a half warp each; of longer ones a block's half warps share the candidates.

#define HELD 8

// The range of a group that a block reads, widened to hold 0, in every thread.
template <class F>
__device__ __forceinline__ void range_block(int width, F value, float *low, float *high) {
    __shared__ float lows[WARP], highs[WARP];
    *low = *high = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float x = value(i);
        *low = fminf(*low, x);
        *high = fmaxf(*high, x);
    }
    range_lanes(low, high, WARP / 2);
    if (threadIdx.x % WARP == 0) {
        lows[threadIdx.x / WARP] = *low;
        highs[threadIdx.x / WARP] = *high;
    }
    __syncthreads();
    for (int i = 0; i < blockDim.x / WARP; i++) {
        *low = fminf(*low, lows[i]);
        *high = fmaxf(*high, highs[i]);
    }
}

// A lane's weights and their importance, padded with zeros to whole lanes: in registers …
struct Registers {
    float x[HELD], h[HELD];
    int chunks;
    template <class F>
    __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (i < chunks) f(x[i], h[i]);
    }
};
// … or where they lie.
struct InPlace {
    const float *row, *importance;
    Group group;
    int lane;
    template <class F>
    __device__ __forceinline__ void each(F f) const {
#pragma unroll 4
        for (int i = lane; i < (group.width + LANES - 1) / LANES * LANES; i += LANES) {
            bool inside = i < group.width;
            f(inside ? row[group.column(i)] : 0.0f, inside ? importance[group.first + i] : 0.0f);
        }
    }
};

// Weighted squared error of a grid.
template <class V>
__device__ __forceinline__ float evaluate(const V &values, float scale, float zero, float max) {
    float inverse = inverse_of(scale), sum = 0.0f;
    values.each([&](float x, float h) {
        float e = x - scale * (code_of(x, inverse, zero, max) - zero);
        sum += h * e * e;
    });
    return sum_lanes(sum);
}

// Σ h x c / Σ h c² for the codes c that a grid gives.
template <class V>
__device__ __forceinline__ float least_squares(const V &values, float scale, float zero, float max) {
    float inverse = inverse_of(scale), cross = 0.0f, square = 0.0f;
    values.each([&](float x, float h) {
        float c = code_of(x, inverse, zero, max) - zero;
        cross += h * x * c;
        square += h * c * c;
    });
    cross = sum_lanes(cross);
    square = sum_lanes(square);
    return square > 0.0f ? cross / square : scale;
}

// The best grid found so far, and which candidate it was.
struct Best {
    float loss, scale, zero;
    int number;
};

template <class V>
__device__ __forceinline__ void consider(
    Best &best, const V &values, const Rules &rules, float scale, float zero, bool wanted, int number) {
    scale = round_scale(rules.precision, scale);
    float loss = evaluate(values, scale, zero, rules.max);
    if (wanted && loss < best.loss) best = {loss, scale, zero, number};
}

template <class V>
__device__ __forceinline__ Best plain(const V &values, const Rules &rules, float low, float high) {
    Best best;
    min_max(rules, low, high, 1.0f, &best.scale, &best.zero);
    best.loss = evaluate(values, best.scale, best.zero, rules.max);
    best.number = -1;
    return best;
}

// A shrunk asymmetric grid: its step, and where zeros may lie.
struct Shrunk {
    float size, missing, top;
    int options;
    __device__ __forceinline__ Shrunk(const Rules &rules, float low, float high, int step) {
        float shrink = 1.0f - (1.0f - rules.from) * (float)step / (float)rules.steps;
        size = (high - low) * shrink / rules.max;
        missing = (high - low) / size - rules.max;
        top = -low / size;
        options = (int)fminf(fmaxf(ceilf(missing) + 1.0f, 2.0f), 9.0f);
    }
    __device__ __forceinline__ float zero(const Rules &rules, int option) const {
        float zero = top + 0.5f - (missing + 1.0f) * (float)option / (float)options;
        return limited(nearest_integer(zero), rules.min_zero, rules.max);
    }
};
#define MOST_OPTIONS 10

__device__ __forceinline__ float symmetric_size(const Rules &rules, float low, float high, int step) {
    return fmaxf(high, -low) / rules.half * (rules.from + (rules.to - rules.from) * (float)step / (float)rules.steps);
}

// The last steps of a search, in a half warp.
template <class V>
__device__ __forceinline__ void settle(Best &best, const V &values, const Rules &rules) {
    for (int turn = 0; turn < 3; turn++) {
        float solved = least_squares(values, best.scale, best.zero, rules.max);
        consider(best, values, rules, solved, best.zero, true, 0);
        if (!rules.symmetric)
            for (int step = -1; step <= 1; step += 2) {
                float zero = limited(best.zero + (float)step, rules.min_zero, rules.max);
                consider(best, values, rules, best.scale, zero, true, 0);
            }
    }
}

// Groups of up to 128 weights, a half warp each; `importance` lies as `columns` do, and is null for the plain range.
KERNEL(fit_short)(
    float *scales, u8 *zeros, const float *weight, const u32 *columns, const u32 *starts, const u32 *list,
    const float *importance, i64 rows, int cols, int groups, int listed, RULES_ARGUMENTS) {
    Rules rules = RULES_OF_ARGUMENTS;
    i64 task = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    int lane = threadIdx.x % LANES;
    bool real = task < rows * listed;
    // Lanes without a group of their own keep the others company.
    i64 row = real ? task / listed : 0;
    int number = list[real ? task % listed : 0];
    Group group = group_of(columns, starts, number);
    Registers values;
    values.chunks = (group.width + LANES - 1) / LANES;
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int j = i * LANES + lane;
        bool inside = j < group.width;
        values.x[i] = inside ? weight[row * cols + group.column(j)] : 0.0f;
        values.h[i] = inside && importance ? importance[group.first + j] : 0.0f;
        low = fminf(low, values.x[i]);
        high = fmaxf(high, values.x[i]);
    }
    range_lanes(&low, &high, LANES / 2);
    Best best;
    if (importance) {
        best = plain(values, rules, low, high);
        if (rules.symmetric) {
            for (int step = 0; step <= rules.steps; step++) {
                float size = symmetric_size(rules, low, high, step);
                consider(best, values, rules, size, rules.half, true, 0);
                consider(best, values, rules, -size, rules.half, true, 0);
            }
        } else {
            for (int step = 0; step <= rules.steps; step++) {
                Shrunk shrunk(rules, low, high, step);
                // Both halves of the warp go on as long as either has options.
                int longest = max(shrunk.options, __shfl_xor_sync(ALL_LANES, shrunk.options, LANES));
                for (int option = 0; option <= longest; option++) {
                    bool wanted = option <= shrunk.options;
                    consider(best, values, rules, shrunk.size, shrunk.zero(rules, option), wanted, 0);
                }
            }
        }
        settle(best, values, rules);
    }
    if (!importance || (low == 0.0f && high == 0.0f)) min_max(rules, low, high, 1.0f, &best.scale, &best.zero);
    if (real && lane == 0) {
        scales[row * groups + number] = best.scale;
        zeros[row * groups + number] = (u8)(int)best.zero;
    }
}
EXPORT(fit_short)

// Longer groups, a block of 256 threads each.
KERNEL(fit_long)(
    float *scales, u8 *zeros, const float *weight, const u32 *columns, const u32 *starts, const u32 *list,
    const float *importance, int cols, int groups, int listed, RULES_ARGUMENTS) {
    __shared__ Best found[256 / LANES];
    Rules rules = RULES_OF_ARGUMENTS;
    i64 row = blockIdx.x / listed;
    int number = list[blockIdx.x % listed];
    Group group = group_of(columns, starts, number);
    const float *from_row = weight + row * cols;
    float low, high;
    range_block(group.width, [&](int i) { return from_row[group.column(i)]; }, &low, &high);
    Best best;
    if (importance && (low != 0.0f || high != 0.0f)) {
        int team = threadIdx.x / LANES, teams = blockDim.x / LANES;
        InPlace values = {from_row, importance, group, (int)threadIdx.x % LANES};
        best = plain(values, rules, low, high);
        int candidates = (rules.steps + 1) * (rules.symmetric ? 2 : MOST_OPTIONS);
        for (int first = 0; first < candidates; first += teams) {
            int own = first + team;
            bool wanted = own < candidates;
            float size, zero;
            if (rules.symmetric) {
                size = symmetric_size(rules, low, high, own / 2);
                size = own % 2 ? -size : size;
                zero = rules.half;
            } else {
                Shrunk shrunk(rules, low, high, own / MOST_OPTIONS);
                wanted = wanted && own % MOST_OPTIONS <= shrunk.options;
                size = shrunk.size;
                zero = shrunk.zero(rules, own % MOST_OPTIONS);
            }
            consider(best, values, rules, size, zero, wanted, own);
        }
        if (threadIdx.x % LANES == 0) found[team] = best;
        __syncthreads();
        if (threadIdx.x < WARP) {
            // Of equals the one that a loop over all would have met first.
            best = found[0];
            for (int i = 1; i < teams; i++)
                if (found[i].loss < best.loss || (found[i].loss == best.loss && found[i].number < best.number)) best = found[i];
            settle(best, values, rules);
        }
    } else {
        min_max(rules, low, high, 1.0f, &best.scale, &best.zero);
    }
    if (threadIdx.x == 0) {
        scales[row * groups + number] = best.scale;
        zeros[row * groups + number] = (u8)(int)best.zero;
    }
}
EXPORT(fit_long)

// Codes, four to a thread.
KERNEL(round_groups)(
    u8 *codes, const float *weight, const float *scales, const u8 *zeros, const u32 *group_of, i64 count, int cols, int groups,
    float max) {
    for (i64 first = 4 * global_index(); first < count; first += 4 * global_stride()) {
        i64 row = first / cols;
        int col = first % cols;
        int left = (int)(count - first < 4 ? count - first : 4);
        u32 all = 0;
        for (int i = 0; i < left; i++) {
            i64 at = row * groups + group_of[col];
            u32 code = (u32)(int)code_of(weight[first + i], inverse_of(scales[at]), (float)zeros[at], max);
            all |= code << 8 * i;
            if (++col == cols) {
                col = 0;
                row++;
            }
        }
        if (left == 4)
            *(u32 *)(codes + first) = all;
        else
            for (int i = 0; i < left; i++) codes[first + i] = (u8)(all >> 8 * i);
    }
}
EXPORT(round_groups)

// What is left of w · t when its plain rounding is taken off, without t.
__device__ __forceinline__ float scaled_error(float scaled, float t, float scale, float zero, float inverse, float max) {
    return (scaled - scale * (code_of(scaled, inverse, zero, max) - zero)) / t;
}

KERNEL(scaled_error_short)(
    float *error, const float *weight, const float *t, const u32 *columns, const u32 *starts, const u32 *list, i64 rows, int cols,
    int listed, RULES_ARGUMENTS) {
    Rules rules = RULES_OF_ARGUMENTS;
    i64 task = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    int lane = threadIdx.x % LANES;
    bool real = task < rows * listed;
    i64 row = real ? task / listed : 0;
    Group group = group_of(columns, starts, list[real ? task % listed : 0]);
    float x[HELD], factor[HELD], low = 0.0f, high = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int j = i * LANES + lane;
        bool inside = j < group.width;
        factor[i] = inside ? t[group.column(j)] : 1.0f;
        x[i] = inside ? weight[row * cols + group.column(j)] * factor[i] : 0.0f;
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
    range_lanes(&low, &high, LANES / 2);
    float scale, zero;
    min_max(rules, low, high, 1.0f, &scale, &zero);
    float inverse = inverse_of(scale);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int j = i * LANES + lane;
        if (real && j < group.width)
            error[row * cols + group.column(j)] = scaled_error(x[i], factor[i], scale, zero, inverse, rules.max);
    }
}
EXPORT(scaled_error_short)

KERNEL(scaled_error_long)(
    float *error, const float *weight, const float *t, const u32 *columns, const u32 *starts, const u32 *list, int cols,
    int listed, RULES_ARGUMENTS) {
    Rules rules = RULES_OF_ARGUMENTS;
    i64 row = blockIdx.x / listed;
    Group group = group_of(columns, starts, list[blockIdx.x % listed]);
    auto scaled = [&](int i) { return weight[row * cols + group.column(i)] * t[group.column(i)]; };
    float low, high, scale, zero;
    range_block(group.width, scaled, &low, &high);
    min_max(rules, low, high, 1.0f, &scale, &zero);
    float inverse = inverse_of(scale);
    for (int i = threadIdx.x; i < group.width; i += blockDim.x)
        error[row * cols + group.column(i)] = scaled_error(scaled(i), t[group.column(i)], scale, zero, inverse, rules.max);
}
EXPORT(scaled_error_long)

// The reals that codes stand for.
KERNEL(dequantize_groups)(
    float *out, const u8 *codes, const float *scales, const u8 *zeros, const u32 *group_of, i64 count, int cols, int groups) {
    for (i64 i = global_index(); i < count; i += global_stride()) {
        i64 at = i / cols * groups + group_of[i % cols];
        out[i] = scales[at] * (float)((int)codes[i] - (int)zeros[at]);
    }
}
EXPORT(dequantize_groups)
