// What is left of an activation once a runtime has rounded it: a warp for each block of 32 or 256 values, or for each token.

// How a block's scale follows from its largest value.
#define SCALE_HALF 0
#define SCALE_INVERSE 1
#define SCALE_SINGLE 2
#define SCALE_FLOATS 3

KERNEL(round_to_bytes)(float *x, i64 blocks, int length, int kind) {
    int lane = threadIdx.x % WARP;
    i64 warps = global_stride() / WARP;
    for (i64 block = global_index() / WARP; block < blocks; block += warps) {
        float *values = x + block * length;
        float largest = 0.0f;
        for (int i = lane; i < length; i += WARP) {
            float size = fabsf(values[i]);
            largest = size > largest ? size : largest;
        }
        largest = warp_max(largest);
        if (kind == SCALE_FLOATS) {
            float d = fmaxf(largest / 448.0f, 1.0f / (448.0f * 512.0f));
            for (int i = lane; i < length; i += WARP) values[i] = d * round_e4m3(values[i] / d);
            continue;
        }
        float inverse = 127.0f / largest, d = largest / 127.0f;
        if (kind == SCALE_HALF) d = from_f16(to_f16(d));
        if (kind == SCALE_INVERSE) d = 1.0f / inverse;
        // Of zeros, or of numbers so small that nothing is left of them.
        if (!(fabsf(inverse) < INFINITE)) d = inverse = 0.0f;
        for (int i = lane; i < length; i += WARP) values[i] = d * rintf(values[i] * inverse);
    }
}
EXPORT(round_to_bytes)

KERNEL(round_to_halves)(float *x, int brain, i64 count) {
    for (i64 i = global_index(); i < count; i += global_stride())
        x[i] = brain ? from_bf16(to_bf16(x[i])) : from_f16(to_f16(x[i]));
}
EXPORT(round_to_halves)
