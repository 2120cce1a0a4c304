// The sweep over columns. Matrices lie here with their columns one after the other, rows side by side: [n][height], `height` a
// multiple of 32 and rows beyond the last all zeros.

// Columns that one launch takes, rows that one of its blocks takes: four lanes carry a row, each every fourth column.
#define SWEEP_PANEL 128
#define SWEEP_ROWS 32
#define SWEEP_LANES 4
#define SWEEP_HELD (SWEEP_PANEL / SWEEP_LANES)
// Four lanes read four values each at a time; rows of the triangle shrink by one such group every sixteen.
#define SWEEP_GROUPS 576

// [rows, cols] → [cols][height]. Blocks of 256 threads take 32 × 32 values.
KERNEL(columns_of)(float *to, const float *from, int rows, int cols, int height) {
    __shared__ float tile[32][33];
    int x = threadIdx.x % 32, y = threadIdx.x / 32, col = blockIdx.x * 32, row = blockIdx.y * 32;
    for (int i = y; i < 32; i += 8)
        tile[i][x] = row + i < rows && col + x < cols ? from[(i64)(row + i) * cols + col + x] : 0.0f;
    __syncthreads();
    for (int i = y; i < 32; i += 8)
        if (col + i < cols) to[(i64)(col + i) * height + row + x] = tile[x][i];
}
EXPORT(columns_of)

// The way back, through a table if there is one, to the column of each position unless `order` is null. [cols][height] → [rows, cols].
KERNEL(codes_to_rows)(u8 *to, const u8 *from, const u8 *table, const u32 *order, int rows, int cols, int height) {
    __shared__ u8 tile[32][33];
    int x = threadIdx.x % 32, y = threadIdx.x / 32, col = blockIdx.x * 32, row = blockIdx.y * 32;
    for (int i = y; i < 32; i += 8)
        if (col + i < cols) tile[i][x] = from[(i64)(col + i) * height + row + x];
    __syncthreads();
    for (int i = y; i < 32; i += 8)
        if (row + i < rows && col + x < cols) {
            u8 code = tile[x][i];
            to[(i64)(row + i) * cols + (order ? (int)order[col + x] : col + x)] = table ? table[code] : code;
        }
}
EXPORT(codes_to_rows)

// [groups][height] of scale, its inverse, and zero or min, from [rows, groups]; one of `zeros` and `mins` is given. Of each column
// `padded` values are written.
KERNEL(grid_columns)(
    float4 *to, const float *scales, const u8 *zeros, const float *mins, int rows, int padded, int groups, int height) {
    i64 count = (i64)groups * padded;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        int group = (int)(i / padded), row = (int)(i % padded);
        i64 from = (i64)row * groups + group;
        float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (row < rows) {
            float scale = scales[from];
            value = make_float4(scale, inverse_of(scale), zeros ? (float)zeros[from] : mins[from], 0.0f);
        }
        to[(i64)group * height + row] = value;
    }
}
EXPORT(grid_columns)

// What a value of a group may become: codes up to the largest,
struct Codes {
    float max;
    __device__ __forceinline__ float nearest(float x, float4 grid, int *code) const {
        float found = limited(nearest_integer(x * grid.y) + grid.z, 0.0f, max);
        *code = (int)found;
        return grid.x * (found - grid.z);
    }
};

// or levels, each kept as a byte that stands for it.
struct Levels {
    LevelSet set;
    __device__ __forceinline__ float nearest(float x, float4 grid, int *code) const {
        float level = nearest_level(set, (x + grid.z) * grid.y);
        *code = (int)kept_of(set, level);
        return grid.x * level - grid.z;
    }
};

struct Sweep {
    const float *target;
    const float *feedback;
    const float *unit;
    const double *pivots;
    // Column and group of each position.
    const u32 *order;
    const u32 *groups;
    const float4 *grid;
    u8 *codes;
    float *errors;
    double *loss;
    int start, width, n, height;
};

// What a block knows of its panel.
struct SweepPanel {
    float4 unit[SWEEP_GROUPS * SWEEP_LANES];
    double pivots[SWEEP_PANEL];
    int columns[SWEEP_PANEL];
    int groups[SWEEP_PANEL];
};

// A row's part in the hands of a lane. Of what is fed back, f[0] is the column at hand's, and later ones follow.
struct SweepLane {
    float f[SWEEP_HELD + 1];
    float target;
    float4 grid;
    double loss;
};

__device__ __forceinline__ void sweep_load(const Sweep &s, const SweepPanel &panel, int p, int row, float *target, float4 *grid) {
    *target = 0.0f;
    *grid = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (p < s.width) {
        *target = s.target[(i64)panel.columns[p] * s.height + row];
        *grid = s.grid[(i64)panel.groups[p] * s.height + row];
    }
}

// Sixteen columns, after which GROUPS - 1 times as many are left; `unit` goes on.
template <int GROUPS, class Points>
__device__ __forceinline__ void sweep_sixteen(
    const Sweep &s, const SweepPanel &panel, const Points &points, SweepLane &lane, int part, int row, const float4 *&unit) {
    if (16 * (8 - GROUPS) >= s.width) return;
#pragma unroll 1
    for (int step = 0; step < 4; step++) {
        int p = SWEEP_LANES * (4 * (8 - GROUPS) + step) + part;
        float target;
        float4 grid;
        sweep_load(s, panel, p + SWEEP_LANES, row, &target, &grid);
        float error;
#pragma unroll
        for (int owner = 0; owner < SWEEP_LANES; owner++) {
            // Lanes after the owner are not ready yet; those before get what they had.
            float wanted = lane.target + lane.f[0];
            int code;
            float value = points.nearest(wanted, lane.grid, &code);
            error = lane.target - value;
            if (owner == SWEEP_LANES - 1 && p < s.width) {
                double missed = wanted - value;
                lane.loss += missed * missed * panel.pivots[p];
                s.codes[(i64)panel.columns[p] * s.height + row] = (u8)code;
                s.errors[(i64)p * s.height + row] = error;
            }
            float shared = __shfl_sync(ALL_LANES, error, owner * 8 + threadIdx.x % 8);
            // The last owner's turn also brings the next columns to the front.
            int ahead = owner == SWEEP_LANES - 1;
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                float4 r = unit[group * SWEEP_LANES + part];
                float *f = lane.f + 4 * group;
                f[0] = fmaf(shared, r.x, f[0 + ahead]);
                f[1] = fmaf(shared, r.y, f[1 + ahead]);
                f[2] = fmaf(shared, r.z, f[2 + ahead]);
                f[3] = fmaf(shared, r.w, f[3 + ahead]);
            }
            unit += GROUPS * SWEEP_LANES;
        }
        lane.target = target;
        lane.grid = grid;
    }
}

template <class Points>
__device__ __forceinline__ void sweep_columns(const Sweep &s, const Points &points) {
    __shared__ SweepPanel panel;
    int within = threadIdx.x % WARP, part = within / 8;
    int row = blockIdx.x * SWEEP_ROWS + threadIdx.x / WARP * 8 + within % 8;
    SweepLane lane;
#pragma unroll
    for (int i = 0; i < SWEEP_HELD; i++) {
        int p = SWEEP_LANES * i + part;
        lane.f[i] = p < s.width ? s.feedback[(i64)(s.start + p) * s.height + row] : 0.0f;
    }
    lane.f[SWEEP_HELD] = 0.0f;
    lane.loss = 0.0;
    int p = threadIdx.x;
    if (p < s.width) {
        panel.pivots[p] = s.pivots[s.start + p];
        panel.columns[p] = s.order[s.start + p];
        panel.groups[p] = s.groups[s.start + p];
    }
    // Row p holds, for each lane, what its columns from the one at hand on get; for the last owner from the one after that on.
#pragma unroll 8
    for (int p = threadIdx.x / WARP; p < SWEEP_PANEL; p += SWEEP_ROWS * SWEEP_LANES / WARP) {
        int first = p / SWEEP_LANES, owner = p % SWEEP_LANES, sixteen = p / 16;
        int groups = 8 - sixteen, before = 16 * (8 * sixteen - sixteen * (sixteen - 1) / 2) + p % 16 * groups;
        float r[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int held = first + within / SWEEP_LANES * 4 + i + (owner == SWEEP_LANES - 1);
            int col = SWEEP_LANES * held + within % SWEEP_LANES;
            bool some = within < groups * SWEEP_LANES && col > p && col < s.width;
            r[i] = some ? s.unit[(i64)(s.start + p) * s.n + s.start + col] : 0.0f;
        }
        if (within < groups * SWEEP_LANES) panel.unit[before * SWEEP_LANES + within] = make_float4(r[0], r[1], r[2], r[3]);
    }
    __syncthreads();
    sweep_load(s, panel, part, row, &lane.target, &lane.grid);
    const float4 *unit = panel.unit;
    sweep_sixteen<8>(s, panel, points, lane, part, row, unit);
    sweep_sixteen<7>(s, panel, points, lane, part, row, unit);
    sweep_sixteen<6>(s, panel, points, lane, part, row, unit);
    sweep_sixteen<5>(s, panel, points, lane, part, row, unit);
    sweep_sixteen<4>(s, panel, points, lane, part, row, unit);
    sweep_sixteen<3>(s, panel, points, lane, part, row, unit);
    sweep_sixteen<2>(s, panel, points, lane, part, row, unit);
    sweep_sixteen<1>(s, panel, points, lane, part, row, unit);
    double loss = lane.loss;
    loss += __shfl_xor_sync(ALL_LANES, loss, 8);
    loss += __shfl_xor_sync(ALL_LANES, loss, 16);
    if (part == 0) s.loss[row] += loss;
}

KERNEL(sweep_codes)(
    const float *target, const float *feedback, const float *unit, const double *pivots, const u32 *order, const u32 *groups,
    const float4 *grid, u8 *codes, float *errors, double *loss, int start, int width, int n, int height, float max) {
    Sweep s = {target, feedback, unit, pivots, order, groups, grid, codes, errors, loss, start, width, n, height};
    sweep_columns(s, Codes{max});
}
EXPORT(sweep_codes)

KERNEL(sweep_levels)(
    const float *target, const float *feedback, const float *unit, const double *pivots, const u32 *order, const u32 *groups,
    const float4 *grid, u8 *codes, float *errors, double *loss, int start, int width, int n, int height, const LevelSet *set) {
    Sweep s = {target, feedback, unit, pivots, order, groups, grid, codes, errors, loss, start, width, n, height};
    sweep_columns(s, Levels{*set});
}
EXPORT(sweep_levels)
