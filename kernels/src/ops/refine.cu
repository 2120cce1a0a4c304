// After the sweep: moves scales, then single codes, wherever the loss falls, as refine.rs says. Matrices lie with their columns one
// after the other, rows side by side, as in the sweep: [n][height], `height` a multiple of 32 and rows beyond the last without effect.
//
// Columns that share a stored scale are a unit: a block of ggml's, or a group. Of each weight a byte is kept: of integers its code, of other
// levels what `kept_of` says; `values` has the level of each such byte. `order` is the column at each position, null where all are where they were.

// Columns of a panel of codes; four lanes carry a row, each every fourth column.
#define REFINE_PANEL 64
#define REFINE_LANES 4
#define REFINE_HELD (REFINE_PANEL / REFINE_LANES)
// Columns and rows that `curvatures` holds of the Hessian at a time.
#define REFINE_TILE 32

// Both triangles of the Hessian, damped. A block of 256 threads takes a tile of 32 × 32 of the lower one, and its image.
KERNEL(damped_whole)(float *to, const float *gram, double factor, int n) {
    __shared__ float tile[32][33];
    int x = threadIdx.x % 32, y = threadIdx.x / 32, col = blockIdx.x * 32, row = blockIdx.y * 32;
    if (col <= row) {
        for (int i = y; i < 32; i += 8)
            if (row + i < n && col + x < n) tile[i][x] = gram[(i64)(row + i) * n + col + x];
        __syncthreads();
        for (int i = y; i < 32; i += 8) {
            float value = col < row || x < i ? tile[i][x] : tile[x][i];
            if (row + i == col + x) value = (float)((double)fmaxf(value, 0.0f) * factor);
            if (row + i < n && col + x < n) to[(i64)(row + i) * n + col + x] = value;
            if (col < row && col + i < n && row + x < n) to[(i64)(col + i) * n + row + x] = tile[x][i];
        }
    }
}
EXPORT(damped_whole)

// The same with columns in order.
KERNEL(damped_ordered)(float *to, const float *gram, const u32 *order, double factor, int n) {
    i64 count = (i64)n * n;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        int row = (int)order[i / n], col = (int)order[i % n];
        float value = gram[row > col ? (i64)row * n + col : (i64)col * n + row];
        to[i] = row == col ? (float)((double)fmaxf(value, 0.0f) * factor) : value;
    }
}
EXPORT(damped_ordered)

// [groups][height] of what a block's scale and min are multiplied by in a group, and [blocks][height] of scales and mins. `scales`
// and `mins` are [rows, groups], or nothing where groups have none of their own; `ends` is [rows, blocks].
KERNEL(block_columns)(
    float2 *factors, float2 *blocks, const i8 *scales, const u8 *mins, const float2 *ends, int has_min, int rows, int groups,
    int per_block, int height) {
    i64 count = (i64)groups * height;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        int group = (int)(i / height), row = (int)(i % height);
        float2 factor = make_float2(0.0f, 0.0f), end = make_float2(0.0f, 0.0f);
        if (row < rows) {
            i64 from = (i64)row * groups + group;
            factor.x = scales ? (float)scales[from] : 1.0f;
            if (has_min) factor.y = scales ? (float)mins[from] : 1.0f;
            end = ends[from / per_block];
        }
        factors[i] = factor;
        if (group % per_block == 0) blocks[(i64)(group / per_block) * height + row] = end;
    }
}
EXPORT(block_columns)

// [groups][height] of scale, its inverse, and min or zero.
KERNEL(expand_columns)(float4 *grid, const float2 *factors, const float2 *blocks, int groups, int per_block, int height) {
    i64 count = (i64)groups * height;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        int group = (int)(i / height), row = (int)(i % height);
        float2 factor = factors[i], block = blocks[(i64)(group / per_block) * height + row];
        float scale = block.x * factor.x;
        grid[i] = make_float4(scale, inverse_of(scale), block.y * factor.y, 0.0f);
    }
}
EXPORT(expand_columns)

// Bytes and errors from codes and targets [rows, n]; `table` holds the byte of each code, `groups` the group of each position. Blocks of
// 256 threads take 32 × 32 values.
KERNEL(errors_of)(
    u8 *levels, float *errors, const float *target, const u8 *codes, const u8 *table, const float4 *grid, const u32 *groups,
    const u32 *order, const float *values, int integers, int rows, int n, int height) {
    __shared__ float targets[32][33];
    __shared__ u8 found[32][33];
    int x = threadIdx.x % 32, y = threadIdx.x / 32, col = blockIdx.x * 32, row = blockIdx.y * 32;
    for (int i = y; i < 32; i += 8) {
        bool some = row + i < rows && col + x < n;
        i64 from = (i64)(row + i) * n + (some && order ? (int)order[col + x] : col + x);
        targets[i][x] = some ? target[from] : 0.0f;
        found[i][x] = some ? table[codes[from]] : table[0];
    }
    __syncthreads();
    for (int i = y; i < 32; i += 8) {
        if (col + i >= n) continue;
        i64 to = (i64)(col + i) * height + row + x;
        float4 at = grid[(i64)groups[col + i] * height + row + x];
        float level = integers ? (float)found[x][i] : values[found[x][i]];
        levels[to] = found[x][i];
        errors[to] = targets[x][i] - (integers ? at.x * (level - at.z) : at.x * level - at.z);
    }
}
EXPORT(errors_of)

// The shift of a unit that is one group, whatever its width.
#define ONE_GROUP 31

// One unit: its first position, and its groups.
struct Unit {
    const u8 *levels;
    // The level of each byte.
    const float *values;
    const float2 *factors;
    // Scale and zero of a unit of integers, in columns; null of a block.
    const float2 *ends;
    int first, group, group_shift, height;
};

// What a value changes by with its unit's scale, and with its offset.
__device__ __forceinline__ float2 slopes(const Unit &b, int col, int row) {
    u8 byte = b.levels[(i64)(b.first + col) * b.height + row];
    if (b.ends) return make_float2((float)byte - b.ends[row].y, -1.0f);
    float2 factor = b.factors[(i64)(b.group + (col >> b.group_shift)) * b.height + row];
    return make_float2(factor.x * b.values[byte], -factor.y);
}

// uᵀHu, uᵀHv and vᵀHv of each unit's slopes, to three tables [units][height]. Blocks of 128 threads, one a row; blockIdx.y is the
// unit, whose positions begin at `starts`. `ends` is null for ggml's blocks, whose groups have `1 << group_shift` columns.
template <bool MIN>
__device__ __forceinline__ void curvatures_of(
    double *out, const u8 *levels, const float *values, const float2 *factors, const float2 *ends, const float *hessian, const u32 *starts, int group_shift,
   
    int n, int height) {
    __shared__ float4 tile[REFINE_TILE][REFINE_TILE / 4];
    int row = blockIdx.x * blockDim.x + threadIdx.x, unit = blockIdx.y;
    int first = (int)starts[unit], width = (int)starts[unit + 1] - first;
    bool mine = row < height;
    row = mine ? row : height - 1;
    // Where a unit is one group nothing is shifted.
    int first_group = group_shift == ONE_GROUP ? unit : first >> group_shift;
    Unit b = {levels, values, factors, ends ? ends + (i64)unit * height : ends, first, first_group, group_shift, height};
    double uu = 0.0, uv = 0.0, vv = 0.0;
    for (int top = 0; top < width; top += REFINE_TILE) {
        float hu[REFINE_TILE], hv[REFINE_TILE];
#pragma unroll
        for (int i = 0; i < REFINE_TILE; i++) hu[i] = hv[i] = 0.0f;
        for (int left = 0; left < width; left += REFINE_TILE) {
            __syncthreads();
            float *flat = (float *)tile;
            for (int i = threadIdx.x; i < REFINE_TILE * REFINE_TILE; i += blockDim.x) {
                int from = left + i / REFINE_TILE, to = top + i % REFINE_TILE;
                // A unit need not be whole tiles.
                bool inside = from < width && to < width;
                flat[i] = inside ? hessian[(i64)(first + from) * n + first + to] : 0.0f;
            }
            __syncthreads();
            int most = width - left < REFINE_TILE ? width - left : REFINE_TILE;
#pragma unroll 2
            for (int j = 0; j < most; j++) {
                float2 s = slopes(b, left + j, row);
#pragma unroll
                for (int i = 0; i < REFINE_TILE / 4; i++) {
                    float4 h = tile[j][i];
                    hu[4 * i] = fmaf(h.x, s.x, hu[4 * i]);
                    hu[4 * i + 1] = fmaf(h.y, s.x, hu[4 * i + 1]);
                    hu[4 * i + 2] = fmaf(h.z, s.x, hu[4 * i + 2]);
                    hu[4 * i + 3] = fmaf(h.w, s.x, hu[4 * i + 3]);
                    if (MIN) {
                        hv[4 * i] = fmaf(h.x, s.y, hv[4 * i]);
                        hv[4 * i + 1] = fmaf(h.y, s.y, hv[4 * i + 1]);
                        hv[4 * i + 2] = fmaf(h.z, s.y, hv[4 * i + 2]);
                        hv[4 * i + 3] = fmaf(h.w, s.y, hv[4 * i + 3]);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < REFINE_TILE; i++) {
            if (top + i >= width) continue;
            float2 s = slopes(b, top + i, row);
            uu += (double)(s.x * hu[i]);
            if (MIN) {
                uv += (double)(s.y * hu[i]);
                vv += (double)(s.y * hv[i]);
            }
        }
    }
    if (mine) {
        i64 at = (i64)unit * height + row, table = (i64)gridDim.y * height;
        out[at] = uu;
        out[table + at] = uv;
        out[2 * table + at] = vv;
    }
}

KERNEL(curvatures)(
    double *out, const u8 *levels, const float *values, const float2 *factors, const float2 *ends, const float *hessian, const u32 *starts, int group_shift,
   
    int n, int height) {
    curvatures_of<false>(out, levels, values, factors, ends, hessian, starts, group_shift, n, height);
}
EXPORT(curvatures)

KERNEL(curvatures_with_offset)(
    double *out, const u8 *levels, const float *values, const float2 *factors, const float2 *ends, const float *hessian, const u32 *starts, int group_shift,
   
    int n, int height) {
    curvatures_of<true>(out, levels, values, factors, ends, hessian, starts, group_shift, n, height);
}
EXPORT(curvatures_with_offset)

// A move of a unit's scale and offset, what it changes the loss by, and how far it goes along both slopes.
struct Move {
    double change;
    float2 to, steps;
};

// What a unit's loss looks like around where it is.
struct Curve {
    double uu, uv, vv, ug, vg;
    __device__ __forceinline__ double change(double s, double t) const {
        return s * s * uu + 2.0 * s * t * uv + t * t * vv - 2.0 * (s * ug + t * vg);
    }
};

// Far moves say that the quadratic is flat there, not that the scale was wrong.
__device__ __forceinline__ bool is_near(float now, float before) {
    float share = now / before;
    return share >= 0.25f && share <= 2.0f;
}

// How scales and mins are stored.
struct Stored {
    int scale, min;
    float global;
};

__device__ __forceinline__ void consider(
    Move &best, const Curve &curve, float2 from, const Stored &stored, double d, double m, bool has_min, bool sub) {
    float new_d = round_scale(stored.scale, (float)d / stored.global) * stored.global;
    float new_m = has_min ? round_scale(stored.min, (float)m) : 0.0f;
    if (!(is_near(new_d, from.x) && fabsf(new_m) < INFINITE) || (sub && new_m < 0.0f)) return;
    double change = curve.change((double)new_d - (double)from.x, (double)new_m - (double)from.y);
    if (change < best.change)
        best = Move{change, make_float2(new_d, new_m), make_float2(new_d - from.x, new_m - from.y)};
}

// A block.
__device__ __forceinline__ Move move_of_block(const Curve &curve, float2 from, const Stored &stored, bool has_min, bool sub) {
    Move best = {0.0, from, make_float2(0.0f, 0.0f)};
    double uu = curve.uu, uv = curve.uv, vv = curve.vv, ug = curve.ug, vg = curve.vg;
    if (uu > 0.0 && from.x != 0.0f) {
        consider(best, curve, from, stored, (double)from.x + ug / uu, (double)from.y, has_min, sub);
        double determinant = uu * vv - uv * uv;
        if (has_min && determinant > 1e-6 * uu * vv) {
            double s = (ug * vv - vg * uv) / determinant, t = (vg * uu - ug * uv) / determinant;
            consider(best, curve, from, stored, (double)from.x + s, (double)from.y + t, has_min, sub);
        }
    }
    return best;
}

// A group of integers, whose zero stays or moves by one.
__device__ __forceinline__ Move move_of_integers(
    const Curve &curve, float2 from, int precision, bool symmetric, float min_zero, float max) {
    Move best = {0.0, from, make_float2(0.0f, 0.0f)};
    for (int turn = 0; turn < (symmetric ? 1 : 3); turn++) {
        double k = turn == 0 ? 0.0 : turn == 1 ? -1.0 : 1.0;
        float zero = from.y + (float)k;
        double curvature = curve.uu + 2.0 * k * curve.uv + k * k * curve.vv;
        bool allowed = turn == 0 || (zero >= min_zero && zero <= max);
        if (!(allowed && curvature > 0.0 && from.x != 0.0f)) continue;
        double wanted = ((double)from.x * (curve.uu + k * curve.uv) + curve.ug + k * curve.vg) / curvature;
        float scale = round_scale(precision, (float)wanted);
        if (!is_near(scale, from.x)) continue;
        double s = (double)scale - (double)from.x, t = (double)scale * k, change = curve.change(s, t);
        if (change < best.change) best = Move{change, make_float2(scale, zero), make_float2((float)s, (float)t)};
    }
    return best;
}

// One exact move of a unit's scale and offset in every row. Blocks of 256 threads: 32 rows, every eighth column of the unit each.
// `ends` and `curvature` begin at the unit, the latter's tables lie `table` apart; `steps` [width][height] is what errors change by.
KERNEL(move_unit)(
    float2 *ends, float *errors, float *steps, const float *pull, const u8 *levels, const float *values, const float2 *factors,
    const double *curvature, i64 table, int unit, int first, int width, int group_shift, int has_min, int has_sub, int integers,
    int precision, int min_precision, float global, int symmetric, float min_zero, float max, int height) {
    __shared__ double sums[2][8][32];
    __shared__ float2 moves[32];
    int lane = threadIdx.x % 32, part = threadIdx.x / 32, row = blockIdx.x * 32 + lane;
    Unit b = {levels, values, factors, integers ? ends : 0, first, group_shift == ONE_GROUP ? unit : first >> group_shift, group_shift, height};
    double ug = 0.0, vg = 0.0;
#pragma unroll 4
    for (int col = part; col < width; col += 8) {
        float2 s = slopes(b, col, row);
        float g = pull[(i64)(first + col) * height + row];
        ug += (double)(s.x * g);
        vg += (double)(s.y * g);
    }
    sums[0][part][lane] = ug;
    sums[1][part][lane] = vg;
    float2 from = ends[row];
    __syncthreads();
    Move best = {0.0, from, make_float2(0.0f, 0.0f)};
    if (part == 0) {
        ug = vg = 0.0;
        for (int i = 0; i < 8; i++) {
            ug += sums[0][i][lane];
            vg += sums[1][i][lane];
        }
        Curve curve = {curvature[row], curvature[table + row], curvature[2 * table + row], ug, vg};
        best = integers ? move_of_integers(curve, from, precision, symmetric, min_zero, max)
                        : move_of_block(curve, from, Stored{precision, min_precision, global}, has_min, has_sub);
        moves[lane] = best.steps;
    }
    __syncthreads();
    float2 move = moves[lane];
#pragma unroll 4
    for (int col = part; col < width; col += 8) {
        float2 s = slopes(b, col, row);
        float step = -(move.x * s.x + move.y * s.y);
        errors[(i64)(first + col) * height + row] += step;
        steps[(i64)col * height + row] = step;
    }
    // Slopes are those of the zero as it was.
    __syncthreads();
    if (part == 0) ends[row] = best.to;
}
EXPORT(move_unit)

// What a block knows of its panel of the Hessian.
struct RefinePanel {
    float4 hessian[REFINE_PANEL][REFINE_HELD / 4][REFINE_LANES];
    // 1 / the diagonal, or 0 where nothing moves.
    float inverse[REFINE_PANEL];
};

// What a value of a group may become: levels,
struct RefinedLevels {
    LevelSet set;
    const float *values;
    __device__ __forceinline__ float of(u8 byte) const { return values[byte]; }
    __device__ __forceinline__ u8 byte(float level) const { return (u8)kept_of(set, level); }
    __device__ __forceinline__ float value(float level, float4 own) const { return own.x * level - own.z; }
    __device__ __forceinline__ float nearest(float x, float4 own) const { return nearest_level(set, (x + own.z) * own.y); }
};

// or codes up to the largest.
struct RefinedCodes {
    float max;
    __device__ __forceinline__ float of(u8 byte) const { return (float)byte; }
    __device__ __forceinline__ u8 byte(float code) const { return (u8)(int)code; }
    __device__ __forceinline__ float value(float code, float4 own) const { return own.x * (code - own.z); }
    __device__ __forceinline__ float nearest(float x, float4 own) const {
        return limited(nearest_integer(x * own.y) + own.z, 0.0f, max);
    }
};

// One round over the codes of `width` columns from `start`, each to where the loss is least while the others stay. Blocks of 128
// threads, 32 rows. `steps` [width][height] is what errors change by; of the pull only the panel's own follows. `groups` is the group of
// each position.
template <class Points>
__device__ __forceinline__ void move_panel(
    const Points &points, u8 *levels, float *errors, float *steps, float *pull, const float *hessian, const float4 *grid,
    const u32 *groups, int start, int width, int n, int height) {
    __shared__ RefinePanel panel;
    int within = threadIdx.x % WARP, part = within / 8;
    int row = blockIdx.x * 32 + threadIdx.x / WARP * 8 + within % 8;
    // The pull of the column at hand comes first, the others follow in a ring.
    float f[REFINE_HELD];
#pragma unroll
    for (int i = 0; i < REFINE_HELD; i++) {
        int p = REFINE_LANES * i + part;
        f[i] = p < width ? pull[(i64)(start + p) * height + row] : 0.0f;
    }
#pragma unroll 4
    for (int i = threadIdx.x; i < REFINE_PANEL * REFINE_HELD; i += blockDim.x) {
        int p = i / REFINE_HELD, group = i % REFINE_HELD / REFINE_LANES, lane = i % REFINE_LANES;
        int first = p / REFINE_LANES + 4 * group + (p % REFINE_LANES == REFINE_LANES - 1);
        float h[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int col = REFINE_LANES * ((first + k) % REFINE_HELD) + lane;
            h[k] = p < width && col < width ? hessian[(i64)(start + p) * n + start + col] : 0.0f;
        }
        panel.hessian[p][group][lane] = make_float4(h[0], h[1], h[2], h[3]);
    }
    if (threadIdx.x < REFINE_PANEL) {
        int p = threadIdx.x;
        float energy = p < width ? hessian[(i64)(start + p) * (n + 1)] : 0.0f;
        panel.inverse[p] = energy > 0.0f ? 1.0f / energy : 0.0f;
    }
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < REFINE_HELD; step++) {
        int p = REFINE_LANES * step + part;
        i64 at = (i64)(start + p) * height + row;
        float level = 0.0f, moved = 0.0f;
        float4 own = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (p < width) {
            level = points.of(levels[at]);
            own = grid[(i64)groups[start + p] * height + row];
        }
        float inverse = panel.inverse[p];
        // A group without a scale has nowhere to go.
        bool stays = own.y == 0.0f || inverse == 0.0f;
#pragma unroll
        for (int owner = 0; owner < REFINE_LANES; owner++) {
            float wanted = points.value(level, own) + f[0] * inverse;
            float found = points.nearest(wanted, own);
            found = stays ? level : found;
            float change = own.x * (level - found);
            if (owner == part) {
                level = found;
                moved = change;
            }
            float shared = __shfl_sync(ALL_LANES, change, owner * 8 + within % 8);
            // The last owner's turn also brings the next columns to the front.
            int ahead = owner == REFINE_LANES - 1;
            float front = f[0];
#pragma unroll
            for (int group = 0; group < REFINE_HELD / 4; group++) {
                float4 h = panel.hessian[REFINE_LANES * step + owner][group][part];
                float next = ahead ? group == REFINE_HELD / 4 - 1 ? front : f[4 * (group + 1) % REFINE_HELD] : f[4 * group + 3];
                f[4 * group] = fmaf(shared, h.x, f[4 * group + ahead]);
                f[4 * group + 1] = fmaf(shared, h.y, f[4 * group + 1 + ahead]);
                f[4 * group + 2] = fmaf(shared, h.z, f[4 * group + 2 + ahead]);
                f[4 * group + 3] = fmaf(shared, h.w, next);
            }
        }
        if (p < width) {
            levels[at] = points.byte(level);
            errors[at] += moved;
            steps[(i64)p * height + row] = moved;
        }
    }
#pragma unroll
    for (int i = 0; i < REFINE_HELD; i++) {
        int p = REFINE_LANES * i + part;
        if (p < width) pull[(i64)(start + p) * height + row] = f[i];
    }
}

KERNEL(move_levels)(
    u8 *levels, float *errors, float *steps, float *pull, const float *hessian, const float4 *grid, const u32 *groups, int start,
    int width, int n, int height, const LevelSet *set, const float *values) {
    move_panel(RefinedLevels{*set, values}, levels, errors, steps, pull, hessian, grid, groups, start, width, n, height);
}
EXPORT(move_levels)

KERNEL(move_codes)(
    u8 *levels, float *errors, float *steps, float *pull, const float *hessian, const float4 *grid, const u32 *groups, int start,
    int width, int n, int height, float max) {
    move_panel(RefinedCodes{max}, levels, errors, steps, pull, hessian, grid, groups, start, width, n, height);
}
EXPORT(move_codes)

// Σ e g of each row; columns without energy count e². Blocks of 256 threads: 32 rows, every eighth column each.
KERNEL(refined_loss)(double *out, const float *errors, const float *pull, const float *hessian, int n, int height) {
    __shared__ double sums[8][32];
    int lane = threadIdx.x % 32, part = threadIdx.x / 32, row = blockIdx.x * 32 + lane;
    double sum = 0.0;
#pragma unroll 4
    for (int col = part; col < n; col += 8) {
        double e = errors[(i64)col * height + row], g = pull[(i64)col * height + row];
        sum += hessian[(i64)col * (n + 1)] <= 0.0f ? e * e : e * g;
    }
    sums[part][lane] = sum;
    __syncthreads();
    if (part == 0) {
        sum = 0.0;
        for (int i = 0; i < 8; i++) sum += sums[i][lane];
        out[row] = sum;
    }
}
EXPORT(refined_loss)
