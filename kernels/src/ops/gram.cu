// Sums over second moments. What is more than a few hundred values is summed in double precision, in one fixed order.

// Tokens that are summed in single precision, as in the CPU backend.
#define MOMENT_TOKENS 512

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(u16 x) { return from_bf16(x); }

// Σ |x| and Σ x² of a thread's column over a block's tokens, to [blockIdx.y] of two tables [chunks, cols].
template <class T>
__device__ __forceinline__ void moments_of(float *magnitude, float *energy, const T *x, i64 tokens, int cols) {
    int col = blockIdx.x * blockDim.x + threadIdx.x;
    i64 first = (i64)blockIdx.y * MOMENT_TOKENS;
    int count = (int)(tokens - first < MOMENT_TOKENS ? tokens - first : MOMENT_TOKENS);
    if (col >= cols) return;
    const T *at = x + first * cols + col;
    float sizes = 0.0f, squares = 0.0f;
#pragma unroll 8
    for (int token = 0; token < count; token++) {
        float value = widened(at[(i64)token * cols]);
        sizes += fabsf(value);
        squares += value * value;
    }
    magnitude[(i64)blockIdx.y * cols + col] = sizes;
    energy[(i64)blockIdx.y * cols + col] = squares;
}

KERNEL(column_moments)(float *magnitude, float *energy, const float *x, i64 tokens, int cols) {
    moments_of(magnitude, energy, x, tokens, cols);
}
EXPORT(column_moments)

KERNEL(column_moments_rounded)(float *magnitude, float *energy, const u16 *x, i64 tokens, int cols) {
    moments_of(magnitude, energy, x, tokens, cols);
}
EXPORT(column_moments_rounded)

// out[j] ← Σ_i parts[i, j], one after the other.
KERNEL(sum_parts)(double *out, const float *parts, int count, i64 cols) {
    for (i64 col = global_index(); col < cols; col += global_stride()) {
        double sum = 0.0;
        for (int i = 0; i < count; i++) sum += (double)parts[i * cols + col];
        out[col] = sum;
    }
}
EXPORT(sum_parts)

KERNEL(diagonal)(float *out, const float *matrix, int count, i64 stride) {
    for (i64 i = global_index(); i < count; i += global_stride()) out[i] = matrix[i * (stride + 1)];
}
EXPORT(diagonal)

// The square [side, side] at `from`, of whose rows `stride` apart the lower triangle is read, whole.
KERNEL(whole_square)(float *to, const float *from, int side, i64 stride) {
    i64 count = (i64)side * side;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        i64 row = i / side, col = i % side;
        to[i] = row > col ? from[row * stride + col] : from[col * stride + row];
    }
}
EXPORT(whole_square)

// x as the sum of two of bfloat16: the nearest, and what is left.
KERNEL(split)(u16 *high, u16 *low, const float *x, i64 count) {
    for (i64 i = global_index(); i < count; i += global_stride()) {
        u16 nearest = to_bf16(x[i]);
        high[i] = nearest;
        low[i] = to_bf16(x[i] - from_bf16(nearest));
    }
}
EXPORT(split)

// Σ a_ij b_ij over the rows of each block, which takes every gridDim.x-th.
KERNEL(dot_rows)(double *out, const float *a, i64 a_stride, const float *b, i64 b_stride, i64 rows, int cols) {
    __shared__ double scratch[32];
    double sum = 0.0;
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x)
        for (int col = threadIdx.x; col < cols; col += blockDim.x)
            sum += (double)a[row * a_stride + col] * (double)b[row * b_stride + col];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
EXPORT(dot_rows)

// Σ e_ij² · weights_j over the rows of each block.
KERNEL(weigh_squares)(double *out, const float *e, const double *weights, i64 rows, int cols) {
    __shared__ double scratch[32];
    double sum = 0.0;
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x)
        for (int col = threadIdx.x; col < cols; col += blockDim.x) {
            double value = e[row * cols + col];
            sum += value * value * weights[col];
        }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
EXPORT(weigh_squares)
