// Scales of ggml's block types and codes on them: what blocks.rs does, to the bit.
//
// A thread has a group of 16 or 32 weights in registers, and the groups of a block lie in neighbouring lanes. No sum over the weights
// of a group leaves its thread; each adds in the order of `sum_lanes`.

#define LANES 16

// What a type is beside its set, and which scales are tried.
struct Layout {
    int groups;  // of a block
    int has_min, has_sub;
    float low, high, max_min;  // of the integers that scale groups
    float from, to;
    int steps;
};
#define LAYOUT_ARGUMENTS \
    int block_groups, int has_min, int has_sub, float sub_low, float sub_high, float max_min, float from, float to, int steps
#define LAYOUT_OF_ARGUMENTS {block_groups, has_min, has_sub, sub_low, sub_high, max_min, from, to, steps}


__device__ __forceinline__ float nearest_half(float x) { return round_scale(PRECISION_F16, x); }

// A group's weights, their importance, the levels that they may take.
template <int G>
struct Tile {
    float x[G], h[G];
    LevelSet set;

    // Σ of K terms over the weights.
    template <int K, class F>
    __device__ __forceinline__ void sums(float *out, F term) const {
        float quarters[4][K];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float columns[4][K];
#pragma unroll
            for (int part = 0; part < 4; part++) {
                int j = i + 4 * part;
                term(columns[part], x[j], h[j]);
                if (G == 32) {
                    float second[K];
                    term(second, x[j + G - 16], h[j + G - 16]);
#pragma unroll
                    for (int k = 0; k < K; k++) columns[part][k] += second[k];
                }
            }
#pragma unroll
            for (int k = 0; k < K; k++)
                quarters[i][k] = (columns[0][k] + columns[2][k]) + (columns[1][k] + columns[3][k]);
        }
#pragma unroll
        for (int k = 0; k < K; k++) out[k] = (quarters[0][k] + quarters[2][k]) + (quarters[1][k] + quarters[3][k]);
    }

    // Σ h (x − scale · level + min)².
    __device__ __forceinline__ float cost(float scale, float min) const {
        float inverse = inverse_of(scale), out[1];
        sums<1>(out, [&](float *to, float x, float h) {
            float e = x - (scale * nearest_level(set, (x + min) * inverse) - min);
            to[0] = h * e * e;
        });
        return out[0];
    }

    // Σ h level, Σ h level² and Σ h x level.
    __device__ __forceinline__ void plane(float *out, float min, float inverse) const {
        sums<3>(out, [&](float *to, float x, float h) {
            float level = nearest_level(set, (x + min) * inverse), hl = h * level;
            to[0] = hl;
            to[1] = hl * level;
            to[2] = hl * x;
        });
    }

    // Σ h and Σ h x.
    __device__ __forceinline__ void whole(float *out) const {
        sums<2>(out, [&](float *to, float x, float h) {
            to[0] = h;
            to[1] = h * x;
        });
    }

    __device__ __forceinline__ void extremes(float *low, float *high) const {
        *low = INFINITE;
        *high = -INFINITE;
#pragma unroll
        for (int j = 0; j < G; j++) {
            *low = fminf(*low, x[j]);
            *high = fmaxf(*high, x[j]);
        }
    }

    // The scale of the best grid without a min, of either sign.
    __device__ __forceinline__ float signed_scale(const Layout &layout) const {
        float low, high, best = -INFINITE, found = 0.0f;
        extremes(&low, &high);
        float size = fmaxf(fabsf(low), fabsf(high)) / fmaxf(fabsf(set.low), set.high);
        // Levels that reach as far up as down need no other sign.
        int signs = -set.low == set.high ? 1 : 2, tries = (layout.steps + 1) * signs;
        for (int number = 0; number < tries; number++) {
            int step = number / signs;
            float sign = number % signs ? -1.0f : 1.0f;
            float share = layout.from + (layout.to - layout.from) * (float)step / (float)layout.steps;
            float inverse = sign / (size * share), out[2];
            sums<2>(out, [&](float *to, float x, float h) {
                float level = nearest_level(set, x * inverse);
                to[0] = h * x * level;
                to[1] = h * level * level;
            });
            float cross = out[0], square = out[1];
            if (size > 0.0f && square > 0.0f && cross * cross > best * square) {
                best = cross * cross / square;
                found = cross / square;
            }
        }
        return found;
    }

    // Scale and min of the best grid; mins below 0 only where the type has them (`any`).
    __device__ __forceinline__ void with_min(const Layout &layout, bool any, float *scale, float *min) const {
        float low, high, sum[2];
        extremes(&low, &high);
        if (!any) {
            low = fminf(low, 0.0f);
            high = fmaxf(high, 0.0f);
        }
        whole(sum);
        double weight = sum[0], first = sum[1];
        float span = (high - low) / set.high;
        *scale = span;
        *min = -low;
        float best = cost(*scale, *min), to = fminf(layout.to, 1.05f);
        for (int step = 0; step <= layout.steps; step++) {
            float share = layout.from + (to - layout.from) * (float)step / (float)layout.steps, out[3];
            plane(out, -low, 1.0f / (span * share));
            double a = out[0], b = out[1], c = out[2];
            double determinant = weight * b - a * a;
            double s = (weight * c - first * a) / determinant, m = (a * c - b * first) / determinant;
            if (m < 0.0 && !any) {
                s = b > 0.0 ? c / b : 0.0;
                m = 0.0;
            }
            // Of what is no number the cost is none either, and never the least.
            float one = determinant > 0.0 && s > 0.0 ? (float)s : NOT_A_NUMBER;
            float other = (float)m, own = cost(one, other);
            if (own < best) {
                best = own;
                *scale = one;
                *min = other;
            }
        }
        if (high <= low) {
            // All equal: the min alone says it, or nothing is left of a group of zeros.
            *scale = 0.0f;
            *min = any ? -low : 0.0f;
        }
    }
};

// A value of each group of the block, in the groups' order.
template <class T, class F>
__device__ __forceinline__ void over_block(int groups, T value, F f) {
    for (int group = 0; group < groups; group++) f(__shfl_sync(ALL_LANES, value, group, groups));
}

// What a block costs and holds: its scale and min, and its own group's integers.
struct Held {
    float cost, d, m, scale, min;
};

__device__ __forceinline__ float block_cost(int groups, float own) {
    float total = 0.0f;
    over_block(groups, own, [&](float cost) { total = total + cost; });
    return total;
}

// Tries a scale and a min of the block, which keeps what it has if they cost more or are no numbers.
template <int G>
__device__ __forceinline__ void consider(
    const Tile<G> &tile, const Layout &layout, float scale, float min, float d, float m, Held *best) {
    float wanted = limited(scale * inverse_of(d), layout.low, layout.high);
    float deep = limited(min * inverse_of(m), 0.0f, layout.max_min);
    // Of a fine scale the nearest integer is as good as any; a coarse one is worth both.
    bool fine = layout.high > 31.0f;
    int sides = fine ? 1 : 2, tries = layout.has_min ? sides * sides : sides;
    float least = INFINITE, found_scale = 0.0f, found_min = 0.0f;
    for (int number = 0; number < tries; number++) {
        bool scale_up = layout.has_min ? number > 1 : number == 1, min_up = layout.has_min && number % 2 == 1;
        float whole_scale = fine ? nearest_integer(wanted) : scale_up ? ceilf(wanted) : floorf(wanted);
        float whole_min = fine ? nearest_integer(deep) : min_up ? ceilf(deep) : floorf(deep);
        float cost = tile.cost(d * whole_scale, m * whole_min);
        if (cost < least) {
            least = cost;
            found_scale = whole_scale;
            found_min = whole_min;
        }
    }
    float total = block_cost(layout.groups, least);
    if (total < best->cost) *best = {total, d, m, found_scale, found_min};
}

// How far the block's scale and min are stretched before anything is solved.
__device__ __forceinline__ float stretch_of(int number) {
    return number == 1 ? 1.04f : number == 2 ? 1.08f : number == 3 ? 0.96f : 1.0f;
}

// Blocks whose groups' scales (and mins) are small integers times the block's.
template <int G>
__device__ __forceinline__ Held two_stages(const Tile<G> &tile, const Layout &layout, float scale, float min) {
    Held best = {INFINITE, 0.0f, 0.0f, 0.0f, 0.0f};
    float widest = 0.0f, deep = 0.0f;
    over_block(layout.groups, scale, [&](float s) { widest = fabsf(s) > fabsf(widest) ? s : widest; });
    over_block(layout.groups, min, [&](float m) { deep = fmaxf(deep, m); });
    float deepest = layout.max_min > 0.0f ? deep / layout.max_min : 0.0f;
    // Zeros stay zeros.
    if (widest == 0.0f && deep == 0.0f) widest = NOT_A_NUMBER;
    bool fine = layout.high > 31.0f;
    int ends = layout.low < 0.0f ? 2 : 1, stretches = fine ? 2 : layout.has_min ? 6 : 4;
    for (int number = 0; number < stretches * ends; number++) {
        int stretch = number / ends;
        float end = number % ends ? layout.low : layout.high, of_d, of_m;
        if (fine) {
            of_d = of_m = stretch ? 1.03f : 1.0f;
        } else {
            of_d = stretch == 4 ? 1.04f : stretch_of(stretch);
            of_m = stretch == 5 ? 1.04f : stretch_of(stretch);
        }
        consider(tile, layout, scale, min, nearest_half(widest / end * of_d), nearest_half(deepest * of_m), &best);
    }
    // Least squares of the block's scale and min under the codes they gave.
    bool done = best.cost == INFINITE;
    float sum[2];
    tile.whole(sum);
    for (int turn = 0; turn < 2; turn++) {
        Held held = best;
        float own[3];
        float group_scale = held.d * held.scale, group_min = held.m * held.min;
        tile.plane(own, group_min, inverse_of(group_scale));
        double s = held.scale, m = held.min;
        double hl = own[0], hll = own[1], hlx = own[2], hs = sum[0], hx = sum[1];
        double aa = 0.0, ab = 0.0, bb = 0.0, ax = 0.0, bx = 0.0;
        over_block(layout.groups, s * s * hll, [&](double x) { aa += x; });
        over_block(layout.groups, s * m * hl, [&](double x) { ab += x; });
        over_block(layout.groups, m * m * hs, [&](double x) { bb += x; });
        over_block(layout.groups, s * hlx, [&](double x) { ax += x; });
        over_block(layout.groups, m * hx, [&](double x) { bx += x; });
        // x ≈ d·a − m·b
        double determinant = aa * bb - ab * ab, moved_d = NOT_A_NUMBER, moved_m = 0.0;
        if (layout.has_min && determinant > 1e-9 * aa * bb) {
            moved_d = (ax * bb - bx * ab) / determinant;
            moved_m = (ax * ab - bx * aa) / determinant;
        } else if (aa > 0.0 && bb == 0.0) {
            moved_d = ax / aa;
        }
        done = done || !(fabs(moved_d) < INFINITE && fabs(moved_m) < INFINITE && moved_m >= 0.0);
        float next_d = done ? NOT_A_NUMBER : nearest_half((float)moved_d);
        float next_m = done ? NOT_A_NUMBER : nearest_half((float)moved_m);
        float total = block_cost(layout.groups, tile.cost(next_d * held.scale, next_m * held.min));
        if (!done && total < best.cost) best = {total, next_d, next_m, held.scale, held.min};
        consider(tile, layout, scale, min, next_d, next_m, &best);
        done = done || best.cost >= held.cost;
        if (__all_sync(ALL_LANES, done)) break;
    }
    return best;
}

// Without data, larger weights count for more: the output's error is in proportion to what they carry. The squares of the whole
// block are added one after the other.
template <int G>
__device__ __forceinline__ void weigh(Tile<G> &tile, int groups) {
    float total = 0.0f;
    for (int group = 0; group < groups; group++) {
        float sum = total;
#pragma unroll
        for (int j = 0; j < G; j++) sum += tile.x[j] * tile.x[j];
        total = __shfl_sync(ALL_LANES, sum, group, groups);
    }
    float spread = sqrtf(total / (float)(groups * G));
#pragma unroll
    for (int j = 0; j < G; j++) tile.h[j] = spread + fabsf(tile.x[j]);
}

template <int G, bool EVEN>
__device__ __forceinline__ void fit(
    float *d, float *m, i8 *scales, u8 *mins, const float *weight, const float *importance, const LevelSet *set, i64 groups,
    int cols, const Layout &layout) {
    Tile<G> tile;
    tile.set = *set;
    tile.set.kind = EVEN ? LEVELS_EVEN : LEVELS_TABLE;
    i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    bool real = index < groups;
    // Lanes without a group of their own keep the others company.
    i64 group = real ? index : groups - 1;
    const float4 *x = (const float4 *)(weight + group * G);
#pragma unroll
    for (int j = 0; j < G / 4; j++) {
        float4 four = x[j];
        tile.x[4 * j] = four.x;
        tile.x[4 * j + 1] = four.y;
        tile.x[4 * j + 2] = four.z;
        tile.x[4 * j + 3] = four.w;
    }
    if (importance) {
        const float4 *h = (const float4 *)(importance + group * G % cols);
#pragma unroll
        for (int j = 0; j < G / 4; j++) {
            float4 four = h[j];
            tile.h[4 * j] = four.x;
            tile.h[4 * j + 1] = four.y;
            tile.h[4 * j + 2] = four.z;
            tile.h[4 * j + 3] = four.w;
        }
    } else {
        weigh(tile, layout.groups);
    }
    float scale, min = 0.0f;
    if (layout.has_min)
        tile.with_min(layout, !layout.has_sub, &scale, &min);
    else
        scale = tile.signed_scale(layout);
    Held held;
    if (layout.has_sub) {
        held = two_stages(tile, layout, scale, min);
    } else {
        held.d = nearest_half(scale);
        held.m = nearest_half(min);
    }
    if (!real) return;
    if (index % layout.groups == 0) {
        d[index / layout.groups] = held.d;
        if (layout.has_min) m[index / layout.groups] = held.m;
    }
    if (layout.has_sub) {
        scales[index] = (i8)(int)held.scale;
        if (layout.has_min) mins[index] = (u8)(int)held.min;
    }
}

#define FIT(name, width, even)                                                                                               \
    KERNEL(name)(                                                                                                            \
        float *d, float *m, i8 *scales, u8 *mins, const float *weight, const float *importance, const LevelSet *set,        \
        i64 groups, int cols, LAYOUT_ARGUMENTS) {                                                                            \
        Layout layout = LAYOUT_OF_ARGUMENTS;                                                                                 \
        fit<width, even>(d, m, scales, mins, weight, importance, set, groups, cols, layout);                              \
    }                                                                                                                        \
    EXPORT(name)
FIT(fit_blocks_even_16, 16, true)
FIT(fit_blocks_even_32, 32, true)
FIT(fit_blocks_uneven_32, 32, false)

// Over half a warp, in the order of `sum_lanes`; in every lane.
__device__ __forceinline__ float sum_half_warp(float value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step >>= 1) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// Blocks of long groups and of powers of two: half a warp each, lane l has the weights l, l + 16, …
#define SINGLE_CHUNKS 16
KERNEL(fit_blocks_singly)(
    float *d, const float *weight, const float *importance, const LevelSet *given, i64 blocks, int cols, int block_len, int power,
    float from, float to, int steps) {
    LevelSet set = *given;
    i64 index = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    int lane = threadIdx.x % LANES, chunks = block_len / LANES;
    bool real = index < blocks;
    i64 block = real ? index : blocks - 1;
    float x[SINGLE_CHUNKS], h[SINGLE_CHUNKS], reach = 0.0f, total = 0.0f;
#pragma unroll
    for (int i = 0; i < SINGLE_CHUNKS; i++) {
        x[i] = h[i] = 0.0f;
        if (i < chunks) {
            x[i] = weight[block * block_len + i * LANES + lane];
            reach = fmaxf(reach, fabsf(x[i]));
            if (importance) {
                h[i] = importance[block * block_len % cols + i * LANES + lane];
            } else {
                for (int other = 0; other < LANES; other++) {
                    float value = __shfl_sync(ALL_LANES, x[i], other, LANES);
                    total += value * value;
                }
            }
        }
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step >>= 1) reach = fmaxf(reach, __shfl_xor_sync(ALL_LANES, reach, step));
    if (!importance) {
        float spread = sqrtf(total / (float)block_len);
#pragma unroll
        for (int i = 0; i < SINGLE_CHUNKS; i++)
            if (i < chunks) h[i] = spread + fabsf(x[i]);
    }
    float found = 0.0f;
    if (power) {
        // Rounded to single precision before its floor is taken, as the CPU's is.
        int plain = (int)floorf((float)log2((double)(reach / set.high)));
        float least = INFINITE;
        for (int exponent = plain - 1; exponent <= plain + 1; exponent++) {
            // Neither end of the byte's range: 2^-127 and below are subnormal.
            float own = __int_as_float((max(-126, min(exponent, 126)) + 127) << 23), inverse = inverse_of(own), sum = 0.0f;
#pragma unroll
            for (int i = 0; i < SINGLE_CHUNKS; i++)
                if (i < chunks) {
                    float e = x[i] - (own * nearest_level(set, (x[i] + 0.0f) * inverse) - 0.0f);
                    sum += h[i] * e * e;
                }
            sum = sum_half_warp(sum);
            if (sum < least) {
                least = sum;
                found = own;
            }
        }
    } else {
        float best = -INFINITE;
        int signs = -set.low == set.high ? 1 : 2;
        for (int number = 0; number < (steps + 1) * signs; number++) {
            float share = from + (to - from) * (float)(number / signs) / (float)steps;
            float size = reach / fmaxf(fabsf(set.low), set.high) * share;
            float inverse = (number % signs ? -1.0f : 1.0f) / size, cross = 0.0f, square = 0.0f;
#pragma unroll
            for (int i = 0; i < SINGLE_CHUNKS; i++)
                if (i < chunks) {
                    float level = nearest_level(set, x[i] * inverse);
                    cross += h[i] * x[i] * level;
                    square += h[i] * level * level;
                }
            cross = sum_half_warp(cross);
            square = sum_half_warp(square);
            if (square > 0.0f && cross * cross > best * square) {
                best = cross * cross / square;
                found = cross / square;
            }
        }
        found = nearest_half(found);
    }
    if (real && lane == 0) d[block] = reach == 0.0f ? 0.0f : found;
}
EXPORT(fit_blocks_singly)

// Where scale and min of a value lie among [rows, groups].
__device__ __forceinline__ i64 group_at(i64 index, int cols, int groups, int width) {
    return index / cols * groups + (int)(index % cols) / width;
}

// Codes, four to a thread; `mins` is null for encodings without. `kept_codes` has the code of each byte that is kept of a level.
KERNEL(round_blocks)(
    u8 *codes, const float *weight, const float *scales, const float *mins, const LevelSet *given, const u8 *kept_codes, i64 count,
    int cols, int groups, int width) {
    LevelSet set = *given;
    // Then four neighbours lie in one group, and the last ones are four.
    bool together = cols % 4 == 0 && width % 4 == 0;
    for (i64 first = 4 * global_index(); first < count; first += 4 * global_stride()) {
        int some = count - first < 4 ? (int)(count - first) : 4;
        float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (together) {
            float4 four = *(const float4 *)(weight + first);
            values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
        } else
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i < some) values[i] = weight[first + i];
        i64 at = group_at(first, cols, groups, width);
        u32 all = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!together && i > 0 && i < some) at = group_at(first + i, cols, groups, width);
            float min = mins ? mins[at] : 0.0f;
            all |= (u32)kept_codes[kept_of(set, nearest_level(set, (values[i] + min) * inverse_of(scales[at])))] << 8 * i;
        }
        if (together)
            *(u32 *)(codes + first) = all;
        else
            for (int i = 0; i < some; i++) codes[first + i] = (u8)(all >> 8 * i);
    }
}
EXPORT(round_blocks)

// The reals that codes stand for.
KERNEL(dequantize_blocks)(
    float *out, const u8 *codes, const float *scales, const float *mins, const float *levels, i64 count, int cols, int groups, int width) {
    bool together = cols % 4 == 0 && width % 4 == 0;
    for (i64 first = 4 * global_index(); first < count; first += 4 * global_stride()) {
        int some = count - first < 4 ? (int)(count - first) : 4;
        u32 all = 0;
        if (together)
            all = *(const u32 *)(codes + first);
        else
            for (int i = 0; i < some; i++) all |= (u32)codes[first + i] << 8 * i;
        i64 at = group_at(first, cols, groups, width);
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!together && i > 0 && i < some) at = group_at(first + i, cols, groups, width);
            values[i] = scales[at] * levels[all >> 8 * i & 255];
            if (mins) values[i] -= mins[at];
        }
        if (together)
            *(float4 *)(out + first) = make_float4(values[0], values[1], values[2], values[3]);
        else
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i < some) out[first + i] = values[i];
    }
}
EXPORT(dequantize_blocks)
