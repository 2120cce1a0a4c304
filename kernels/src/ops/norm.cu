// Norms slices of `width` values, a block each, from x to y (which may be x): by the root mean square (kind 0), by mean and variance (1),
// or by the length (2). Weights repeat after `weights` values, biases after `biases`.
//
// What a thread reads is four values side by side, as memory gives 16 bytes at a time, where the lengths allow it. Where a product is
// all that reads the result, it is written in bfloat16 at once.

__device__ __forceinline__ void put(float *to, float value) { *to = value; }
__device__ __forceinline__ void put(u16 *to, float value) { *to = to_bf16(value); }
__device__ __forceinline__ void put_four(float *to, float4 v) { *(float4 *)to = v; }
__device__ __forceinline__ void put_four(u16 *to, float4 v) {
    *(uint2 *)to = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}

// Σ (x − mean), or with `squares` Σ (x − mean)², of a block's slice.
__device__ __forceinline__ float sum_of(const float *x, int width, float mean, bool squares, bool fours, float *scratch) {
    float sum = 0.0f;
    if (fours) {
        for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
            float4 v = *(const float4 *)(x + i);
            float a = v.x - mean, b = v.y - mean, c = v.z - mean, d = v.w - mean;
            sum += squares ? (a * a + b * b) + (c * c + d * d) : (a + b) + (c + d);
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            float value = x[i] - mean;
            sum += squares ? value * value : value;
        }
    }
    return block_sum(sum, scratch);
}

template <class Out>
__device__ __forceinline__ void norm_slice(
    Out *y, const float *x, const float *weight, const float *bias, int width, int weights, int biases, int kind, float eps) {
    __shared__ float scratch[32];
    i64 slice = blockIdx.x;
    const float *from = x + slice * width;
    Out *to = y + slice * width;
    // A slice lies within one repetition.
    const float *weights_here = weight + slice * width % weights;
    const float *biases_here = bias ? bias + slice * width % biases : 0;
    bool fours = width % 4 == 0 && weights % 4 == 0 && (!bias || biases % 4 == 0);
    float mean = kind == 1 ? sum_of(from, width, 0.0f, false, fours, scratch) / width : 0.0f;
    float scale = 1.0f / sqrtf(sum_of(from, width, mean, true, fours, scratch) / (kind == 2 ? 1 : width) + eps);
    if (fours) {
        for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
            float4 v = *(const float4 *)(from + i), w = *(const float4 *)(weights_here + i);
            float4 b = bias ? *(const float4 *)(biases_here + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float4 out = make_float4(
                (v.x - mean) * scale * w.x, (v.y - mean) * scale * w.y, (v.z - mean) * scale * w.z, (v.w - mean) * scale * w.w);
            if (bias) out = make_float4(out.x + b.x, out.y + b.y, out.z + b.z, out.w + b.w);
            put_four(to + i, out);
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float value = (from[i] - mean) * scale * weights_here[i];
        put(to + i, bias ? value + biases_here[i] : value);
    }
}

KERNEL(norm_slices)(
    float *y, const float *x, const float *weight, const float *bias, int width, int weights, int biases, int kind, float eps) {
    norm_slice(y, x, weight, bias, width, weights, biases, kind, eps);
}
EXPORT(norm_slices)

KERNEL(norm_rounded)(
    u16 *y, const float *x, const float *weight, const float *bias, int width, int weights, int biases, int kind, float eps) {
    norm_slice(y, x, weight, bias, width, weights, biases, kind, eps);
}
EXPORT(norm_rounded)
