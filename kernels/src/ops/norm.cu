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
    // A slice lies within one repetition.
    const float *weights_here = weight + slice * width % weights;
    const float *biases_here = bias ? bias + slice * width % biases : 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float value = (from[i] - mean) * scale * weights_here[i];
        to[i] = bias ? value + biases_here[i] : value;
    }
}
EXPORT(norm_slices)
