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
