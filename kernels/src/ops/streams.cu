// Several streams of `width` values side by side, and gates that let few values through.

// y[t, i] += Σ coefficients[t, i, j] · x[t, j] for `to` and `from` streams.
KERNEL(mix_streams)(
    float *y, const float *x, const float *coefficients, i64 tokens, int from, int to, int width) {
    i64 count = tokens * to * width;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        int within = (int)(i % width);
        i64 stream = i / width, token = stream / to;
        const float *shares = coefficients + stream * from;
        const float *values = x + token * from * width + within;
        float sum = y[i];
        for (int j = 0; j < from; j++) sum += shares[j] * values[(i64)j * width];
        y[i] = sum;
    }
}
EXPORT(mix_streams)

// Makes every stream of a token, a block each, as large as its first.
KERNEL(match_streams)(float *x, int count, int width, float least) {
    __shared__ float scratch[32];
    float *row = x + (i64)blockIdx.x * count * width;
    float size = 0.0f;
    for (int stream = 0; stream < count; stream++) {
        float *values = row + (i64)stream * width;
        float sum = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += values[i] * values[i];
        float square = block_sum(sum, scratch) / width;
        if (stream == 0) size = sqrtf(square);
        float factor = stream == 0 ? 1.0f : size / sqrtf(square < least ? least : square);
        for (int i = threadIdx.x; i < width; i += blockDim.x) values[i] *= factor;
    }
}
EXPORT(match_streams)

// How far x and y agree in each stream, a block each: r = Σ x·y / √width, and of it sign(r) · √max(|r|, least).
KERNEL(agree_streams)(float *out, const float *x, const float *y, int width, float least) {
    __shared__ float scratch[32];
    i64 first = (i64)blockIdx.x * width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += x[first + i] * y[first + i];
    sum = block_sum(sum, scratch) / sqrtf((float)width);
    float size = sqrtf(fabsf(sum) < least ? least : fabsf(sum));
    if (threadIdx.x == 0) out[blockIdx.x] = sum > 0.0f ? size : sum < 0.0f ? -size : sum;
}
EXPORT(agree_streams)

// x ← max(x − mean − deviations · √variance, 0), a block for each row.
KERNEL(cut_rows)(float *x, int cols, float deviations) {
    __shared__ float scratch[32];
    float *row = x + (i64)blockIdx.x * cols;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) sum += row[i];
    float mean = block_sum(sum, scratch) / cols;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) squares += (row[i] - mean) * (row[i] - mean);
    float least = mean + sqrtf(block_sum(squares, scratch) / cols) * deviations;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        float value = row[i] - least;
        row[i] = value > 0.0f ? value : 0.0f;
    }
}
EXPORT(cut_rows)
