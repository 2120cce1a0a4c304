// Hyper-connections: the weights by which a token's streams are read, written and mixed, and what is done by them.

// The most streams of a token.
#define STREAMS 16

// The sum over a warp of one value of each thread, in all of them.
__device__ __forceinline__ float warp_sum_of(float value) {
    for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// sizes[t] = 1 / sqrt(mean of squares + eps) of each row of h, a warp each.
KERNEL(stream_sizes)(float *sizes, const float *h, i64 tokens, int width, float eps) {
    i64 token = (i64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    // Warps beyond the last row do it once more, and write nothing.
    bool writes = token < tokens;
    const float *row = h + (writes ? token : tokens - 1) * width;
    float sum = 0.0f;
    for (int i = lane; i < width; i += WARP) sum += row[i] * row[i];
    sum = warp_sum_of(sum);
    if (writes && lane == 0) sizes[token] = 1.0f / sqrtf(sum / width + eps);
}
EXPORT(stream_sizes)

// Makes weights of the products of each token in place, a thread each: sigmoids that read, `magnitude` times sigmoids plus `more` that write
// unless `magnitude` is negative, and with `rounds` a matrix that mixes.
KERNEL(stream_weights)(
    float *out, const float *sizes, const float *base, const float *scale, i64 tokens, int n, int count, float eps, float magnitude, float more,
    int rounds) {
    for (i64 token = global_index(); token < tokens; token += global_stride()) {
        float *w = out + token * count;
        for (int i = 0; i < count; i++) w[i] = w[i] * sizes[token] * scale[min(i / n, 2)] + base[i];
        for (int i = 0; i < n; i++) w[i] = 1.0f / (1.0f + exp_as_cpu(-w[i])) + eps;
        if (magnitude >= 0.0f)
            for (int i = n; i < 2 * n; i++) w[i] = magnitude * (1.0f / (1.0f + exp_as_cpu(-w[i]))) + more;
        if (rounds == 0) continue;
        float *matrix = w + 2 * n;
        for (int j = 0; j < n; j++) {
            float *row = matrix + j * n, top = -INFINITE, sum = 0.0f;
            for (int k = 0; k < n; k++) top = fmaxf(top, row[k]);
            for (int k = 0; k < n; k++) {
                row[k] = exp_as_cpu(row[k] - top);
                sum += row[k];
            }
            for (int k = 0; k < n; k++) row[k] = row[k] / sum + eps;
        }
        for (int round = 0; round < 2 * rounds - 1; round++) {
            // Columns first.
            int along = round % 2 == 0 ? n : 1, across = round % 2 == 0 ? 1 : n;
            for (int line = 0; line < n; line++) {
                float sum = 0.0f;
                for (int i = 0; i < n; i++) sum += matrix[line * across + i * along];
                sum += eps;
                for (int i = 0; i < n; i++) matrix[line * across + i * along] /= sum;
            }
        }
    }
}
EXPORT(stream_weights)

// out[t, d] = Σ weights[t, i] · h[t, i, d].
KERNEL(read_streams)(float *out, const float *h, const float *weights, i64 tokens, int hidden, int n, int count) {
    i64 all = tokens * hidden;
    for (i64 i = global_index(); i < all; i += global_stride()) {
        i64 token = i / hidden;
        const float *from = h + token * n * hidden + i % hidden, *w = weights + token * count;
        float sum = 0.0f;
        for (int k = 0; k < n; k++) sum += w[k] * from[(i64)k * hidden];
        out[i] = sum;
    }
}
EXPORT(read_streams)

// h[t, k, d] ← weights[t, n + k] · y[t, d] + Σ weights[t, 2n + j n + k] · h[t, j, d], or without `mixes` + h[t, k, d].
KERNEL(write_streams)(float *h, const float *y, const float *weights, i64 tokens, int hidden, int n, int count, int mixes) {
    i64 all = tokens * hidden;
    for (i64 i = global_index(); i < all; i += global_stride()) {
        i64 token = i / hidden;
        float *to = h + token * n * hidden + i % hidden;
        const float *w = weights + token * count;
        float old[STREAMS];
#pragma unroll
        for (int k = 0; k < STREAMS; k++) old[k] = k < n ? to[(i64)k * hidden] : 0.0f;
        for (int k = 0; k < n; k++) {
            float sum = 0.0f;
            if (mixes) {
#pragma unroll
                for (int j = 0; j < STREAMS; j++)
                    if (j < n) sum += w[(2 + j) * n + k] * old[j];
            } else sum = to[(i64)k * hidden];
            to[(i64)k * hidden] = sum + w[n + k] * y[i];
        }
    }
}
EXPORT(write_streams)
