// After the sweep: moves the blocks' scales, then single codes, wherever the loss falls. Matrices lie with their columns one after
// the other, rows side by side, as in the sweep: [n][height], `height` a multiple of 32 and rows beyond the last without effect.
// Levels are kept with 128 added.

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

// [groups][height] of scale, its inverse, and min.
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

// Levels and errors from codes and targets [rows, n]; `table` holds each code's level. Blocks of 256 threads take 32 × 32 values.
KERNEL(errors_of)(
    u8 *levels, float *errors, const float *target, const u8 *codes, const i8 *table, const float4 *grid, int group, int rows,
    int n, int height) {
    __shared__ float targets[32][33];
    __shared__ i8 found[32][33];
    int x = threadIdx.x % 32, y = threadIdx.x / 32, col = blockIdx.x * 32, row = blockIdx.y * 32;
    for (int i = y; i < 32; i += 8) {
        bool some = row + i < rows && col + x < n;
        i64 from = (i64)(row + i) * n + col + x;
        targets[i][x] = some ? target[from] : 0.0f;
        found[i][x] = some ? table[codes[from]] : 0;
    }
    __syncthreads();
    for (int i = y; i < 32; i += 8) {
        if (col + i >= n) continue;
        i64 to = (i64)(col + i) * height + row + x;
        float4 at = grid[(i64)((col + i) / group) * height + row + x];
        int level = found[x][i];
        levels[to] = (u8)(level + 128);
        errors[to] = targets[x][i] - (at.x * (float)level - at.z);
    }
}
EXPORT(errors_of)

struct Blocks {
    const u8 *levels;
    const float2 *factors;
    int first, group_shift, height;
};

// What a column's error changes by with its block's scale, and with its min.
__device__ __forceinline__ float2 slopes(const Blocks &b, int col, int row) {
    int at = b.first + col;
    float2 factor = b.factors[(i64)(at >> b.group_shift) * b.height + row];
    return make_float2(factor.x * (float)((int)b.levels[(i64)at * b.height + row] - 128), -factor.y);
}

// uᵀHu, uᵀHv and vᵀHv of each block's slopes, to three tables [blocks][height]. Blocks of 128 threads, one a row; blockIdx.y is the
// block.
template <bool MIN>
__device__ __forceinline__ void curvatures_of(
    double *out, const u8 *levels, const float2 *factors, const float *hessian, int width, int group_shift, int n, int height) {
    __shared__ float4 tile[REFINE_TILE][REFINE_TILE / 4];
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    bool mine = row < height;
    row = mine ? row : height - 1;
    Blocks b = {levels, factors, (int)blockIdx.y * width, group_shift, height};
    double uu = 0.0, uv = 0.0, vv = 0.0;
    for (int top = 0; top < width; top += REFINE_TILE) {
        float hu[REFINE_TILE], hv[REFINE_TILE];
#pragma unroll
        for (int i = 0; i < REFINE_TILE; i++) hu[i] = hv[i] = 0.0f;
        for (int left = 0; left < width; left += REFINE_TILE) {
            __syncthreads();
            float *flat = (float *)tile;
            for (int i = threadIdx.x; i < REFINE_TILE * REFINE_TILE; i += blockDim.x) {
                i64 from = b.first + left + i / REFINE_TILE, to = b.first + top + i % REFINE_TILE;
                flat[i] = hessian[from * n + to];
            }
            __syncthreads();
#pragma unroll 2
            for (int j = 0; j < REFINE_TILE; j++) {
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
            float2 s = slopes(b, top + i, row);
            uu += (double)(s.x * hu[i]);
            if (MIN) {
                uv += (double)(s.y * hu[i]);
                vv += (double)(s.y * hv[i]);
            }
        }
    }
    if (mine) {
        i64 at = (i64)blockIdx.y * height + row, table = (i64)gridDim.y * height;
        out[at] = uu;
        out[table + at] = uv;
        out[2 * table + at] = vv;
    }
}

KERNEL(curvatures)(
    double *out, const u8 *levels, const float2 *factors, const float *hessian, int width, int group_shift, int n, int height) {
    curvatures_of<false>(out, levels, factors, hessian, width, group_shift, n, height);
}
EXPORT(curvatures)

KERNEL(curvatures_with_min)(
    double *out, const u8 *levels, const float2 *factors, const float *hessian, int width, int group_shift, int n, int height) {
    curvatures_of<true>(out, levels, factors, hessian, width, group_shift, n, height);
}
EXPORT(curvatures_with_min)

// A move of a block's scale and min, and what it changes the loss by.
struct Move {
    double change;
    float2 to;
};

__device__ __forceinline__ void consider(
    Move &best, float2 from, double d, double m, double uu, double uv, double vv, double ug, double vg, bool sub) {
    float new_d = round_scale(PRECISION_F16, (float)d), new_m = round_scale(PRECISION_F16, (float)m);
    // Far moves say that the quadratic is flat there, not that the scale was wrong.
    float near = new_d / from.x;
    if (!(near >= 0.25f && near <= 2.0f && fabsf(new_m) < INFINITE) || (sub && new_m < 0.0f)) return;
    double s = (double)new_d - (double)from.x, t = (double)new_m - (double)from.y;
    double change = s * s * uu + 2.0 * s * t * uv + t * t * vv - 2.0 * (s * ug + t * vg);
    if (change < best.change) best = Move{change, make_float2(new_d, new_m)};
}

// One exact move of a block's scale and min in every row. Blocks of 256 threads: 32 rows, every eighth column of the block each.
// `blocks` and `curvature` begin at the block, the latter's tables lie `table` apart; `steps` [width][height] is what errors change by.
KERNEL(move_block)(
    float2 *blocks, float *errors, float *steps, const float *pull, const u8 *levels, const float2 *factors,
    const double *curvature, i64 table, int first, int width, int group_shift, int has_min, int has_sub, int height) {
    __shared__ double sums[2][8][32];
    __shared__ float2 moves[32];
    int lane = threadIdx.x % 32, part = threadIdx.x / 32, row = blockIdx.x * 32 + lane;
    Blocks b = {levels, factors, first, group_shift, height};
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
    __syncthreads();
    if (part == 0) {
        ug = vg = 0.0;
        for (int i = 0; i < 8; i++) {
            ug += sums[0][i][lane];
            vg += sums[1][i][lane];
        }
        double uu = curvature[row], uv = curvature[table + row], vv = curvature[2 * table + row];
        float2 from = blocks[row];
        Move best = {0.0, from};
        if (uu > 0.0 && from.x != 0.0f) {
            consider(best, from, (double)from.x + ug / uu, (double)from.y, uu, uv, vv, ug, vg, has_sub);
            double determinant = uu * vv - uv * uv;
            if (has_min && determinant > 1e-6 * uu * vv) {
                double s = (ug * vv - vg * uv) / determinant, t = (vg * uu - ug * uv) / determinant;
                consider(best, from, (double)from.x + s, (double)from.y + t, uu, uv, vv, ug, vg, has_sub);
            }
        }
        blocks[row] = best.to;
        moves[lane] = make_float2(best.to.x - from.x, best.to.y - from.y);
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
}
EXPORT(move_block)

// What a block knows of its panel of the Hessian.
struct RefinePanel {
    float4 hessian[REFINE_PANEL][REFINE_HELD / 4][REFINE_LANES];
    // 1 / the diagonal, or 0 where nothing moves.
    float inverse[REFINE_PANEL];
};

// One round over the codes of `width` columns from `start`, each to where the loss is least while the others stay. Blocks of 128
// threads, 32 rows. `steps` [width][height] is what errors change by; of the pull only the panel's own follows.
KERNEL(move_codes)(
    u8 *levels, float *errors, float *steps, float *pull, const float *hessian, const float4 *grid, const LevelSet *table, int start,
    int width, int group_shift, int n, int height) {
    __shared__ RefinePanel panel;
    LevelSet set = *table;
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
            level = (float)((int)levels[at] - 128);
            own = grid[(i64)((start + p) >> group_shift) * height + row];
        }
        float inverse = panel.inverse[p];
        // A group without a scale has nowhere to go.
        bool stays = own.y == 0.0f || inverse == 0.0f;
#pragma unroll
        for (int owner = 0; owner < REFINE_LANES; owner++) {
            float wanted = own.x * level - own.z + f[0] * inverse;
            float found = nearest_level(set, (wanted + own.z) * own.y);
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
            levels[at] = (u8)((int)level + 128);
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
