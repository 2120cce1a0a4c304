// Norms slices of `width` values, a block each, from x to y (which may be x). Weights repeat after `weights` values, biases after
// `biases`.

KERNEL(norm_slices)(
    float *y, const float *x, const float *weight, const float *bias, int width, int weights, int biases, int centred, float eps) {
    __shared__ float scratch[32];
    i64 slice = blockIdx.x;
    const float *from = x + slice * width;
    float *to = y + slice * width;
    float mean = 0.0f;
    if (centred) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += from[i];
        mean = block_sum(sum, scratch) / width;
    }
    float square = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float value = from[i] - mean;
        square += value * value;
    }
    float scale = 1.0f / sqrtf(block_sum(square, scratch) / width + eps);
    i64 first = slice * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float value = (from[i] - mean) * scale * weight[(first + i) % weights];
        to[i] = bias ? value + bias[(first + i) % biases] : value;
    }
}
EXPORT(norm_slices)
