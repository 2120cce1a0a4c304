// Scales and zeros of integer grids, and codes on them: what fit.rs, round.rs and scaled.rs do, to the bit.
//
// The CPU keeps 16 lanes apart in its sums; here they are half a warp, whose lane l has the weights l, l + 16, … of a group. Groups
// of up to 128 weights lie in registers, a half warp each; of longer ones a block's half warps share the candidates.

#define LANES 16
#define HELD 8


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

// Clipping by a group's own block of the Hessian. Four threads have two of a row's eleven candidates: thread t the lanes t, t + 4,
// t + 8 and t + 12 of their errors, in registers; the block passes through shared memory some rows at a time.
#define CANDIDATES 11
#define CLIP_ROWS 8
#define CLIP_THREADS (CLIP_ROWS * (CANDIDATES + 1) / 2 * 4)
#define WIDEST_BLOCK 256
#define TILE_ROWS 16

// Rows of such a block: `chunks` times 16 columns in the order in which threads read them, those beyond whole chunks behind.
__device__ __forceinline__ int block_stride(int chunks) { return LANES * chunks + LANES; }

// The blocks of listed groups, both triangles; a block of threads for each row of each. The memory is cleared.
KERNEL(fit_hessian_blocks)(
    float *blocks, const float *hessian, const u32 *columns, const u32 *starts, const u32 *list, int cols, int widest, int chunks) {
    Group group = group_of(columns, starts, list[blockIdx.x / widest]);
    int i = blockIdx.x % widest, stride = block_stride(chunks), whole = group.width / LANES * LANES;
    if (i >= group.width) return;
    float *to = blocks + (i64)blockIdx.x * stride;
    i64 row = group.column(i);
    for (int j = threadIdx.x; j < group.width; j += blockDim.x) {
        i64 col = group.column(j);
        int lane = j % LANES;
        int place = j < whole ? j - lane + lane % 4 * 4 + lane / 4 : LANES * chunks + j - whole;
        to[place] = row > col ? hessian[row * cols + col] : hessian[col * cols + row];
    }
}
EXPORT(fit_hessian_blocks)

// A candidate's grid.
struct Clipped {
    float scale, zero, inverse;
    __device__ __forceinline__ void set(const Rules &rules, float low, float high, int step) {
        min_max(rules, low, high, 1.0f - 0.05f * (float)step, &scale, &zero);
        inverse = inverse_of(scale);
    }
    __device__ __forceinline__ float error(float x, float max) const {
        return x - scale * (code_of(x, inverse, zero, max) - zero);
    }
};

template <int CHUNKS>
__device__ __forceinline__ void clip(
    float *scales, u8 *zeros, const float *weight, const u32 *columns, const u32 *starts, const u32 *list, const float *blocks,
    i64 rows, int cols, int groups, int listed, int widest, const Rules &rules) {
    const int STRIDE = LANES * CHUNKS + LANES;
    __shared__ __align__(16) float tile[TILE_ROWS * STRIDE];
    __shared__ float x[CLIP_ROWS][LANES * CHUNKS + 1];
    __shared__ float losses[CLIP_ROWS][CANDIDATES + 1];
    int entry = blockIdx.x % listed, number = list[entry];
    i64 first = (i64)(blockIdx.x / listed) * CLIP_ROWS;
    Group group = group_of(columns, starts, number);
    int width = group.width, whole = width / LANES * LANES;
    for (int i = threadIdx.x; i < CLIP_ROWS * width; i += CLIP_THREADS) {
        i64 row = first + i / width;
        x[i / width][i % width] = row < rows ? weight[row * cols + group.column(i % width)] : 0.0f;
    }
    __syncthreads();
    int t = threadIdx.x % 4, team = threadIdx.x / 4;
    int own = team / ((CANDIDATES + 1) / 2), step = team % ((CANDIDATES + 1) / 2) * 2;
    float low = 0.0f, high = 0.0f;
    for (int i = t; i < width; i += 4) {
        low = fminf(low, x[own][i]);
        high = fmaxf(high, x[own][i]);
    }
    range_lanes(&low, &high, 2);
    Clipped grids[2];
    float e[2][CHUNKS][4], total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int v = 0; v < 2; v++) {
        grids[v].set(rules, low, high, step + v);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int j = c * LANES + t + 4 * k;
                e[v][c][k] = j < whole ? grids[v].error(x[own][j], rules.max) : 0.0f;
            }
    }
    const float *block = blocks + (i64)entry * widest * STRIDE;
    for (int above = 0; above < width; above += TILE_ROWS) {
        int here = min(TILE_ROWS, width - above);
        __syncthreads();
        for (int i = threadIdx.x; i < here * STRIDE / 4; i += CLIP_THREADS)
            ((float4 *)tile)[i] = ((const float4 *)(block + above * STRIDE))[i];
        __syncthreads();
        for (int i = 0; i < here; i++) {
            const float *line = tile + i * STRIDE;
            float lanes[2][4] = {};
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                float4 h = *(const float4 *)(line + c * LANES + 4 * t);
#pragma unroll
                for (int v = 0; v < 2; v++) {
                    lanes[v][0] += h.x * e[v][c][0];
                    lanes[v][1] += h.y * e[v][c][1];
                    lanes[v][2] += h.z * e[v][c][2];
                    lanes[v][3] += h.w * e[v][c][3];
                }
            }
#pragma unroll
            for (int v = 0; v < 2; v++) {
                // As `sum_lanes`: the first two halvings in the thread.
                float sum = (lanes[v][0] + lanes[v][2]) + (lanes[v][1] + lanes[v][3]);
                sum += __shfl_xor_sync(ALL_LANES, sum, 2);
                sum += __shfl_xor_sync(ALL_LANES, sum, 1);
                float rest = 0.0f;
                for (int j = whole; j < width; j++) rest += line[LANES * CHUNKS + j - whole] * grids[v].error(x[own][j], rules.max);
                total[v] += (sum + rest) * grids[v].error(x[own][above + i], rules.max);
            }
        }
    }
    if (t == 0) {
        losses[own][step] = total[0];
        losses[own][step + 1] = total[1];
    }
    __syncthreads();
    // A thread that knows the row's range.
    i64 row = first + own;
    if (t == 0 && step == 0 && row < rows) {
        float least = INFINITE;
        int chosen = 0;
        for (int i = 0; i < CANDIDATES; i++)
            if (losses[own][i] < least) {
                least = losses[own][i];
                chosen = i;
            }
        Clipped grid;
        grid.set(rules, low, high, chosen);
        scales[row * groups + number] = grid.scale;
        zeros[row * groups + number] = (u8)(int)grid.zero;
    }
}

#define CLIP(name, chunks)                                                                                                  \
    KERNEL(name)(                                                                                                           \
        float *scales, u8 *zeros, const float *weight, const u32 *columns, const u32 *starts, const u32 *list,              \
        const float *blocks, i64 rows, int cols, int groups, int listed, int widest, RULES_ARGUMENTS) {                     \
        Rules rules = RULES_OF_ARGUMENTS;                                                                                   \
        clip<chunks>(scales, zeros, weight, columns, starts, list, blocks, rows, cols, groups, listed, widest, rules);      \
    }                                                                                                                       \
    EXPORT(name)
CLIP(fit_clip_2, 2)
CLIP(fit_clip_4, 4)
CLIP(fit_clip_8, 8)
CLIP(fit_clip_16, 16)

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
KERNEL(restore_groups)(
    float *out, const u8 *codes, const float *scales, const u8 *zeros, const u32 *group_of, i64 count, int cols, int groups) {
    for (i64 i = global_index(); i < count; i += global_stride()) {
        i64 at = i / cols * groups + group_of[i % cols];
        out[i] = scales[at] * (float)((int)codes[i] - (int)zeros[at]);
    }
}
EXPORT(restore_groups)
