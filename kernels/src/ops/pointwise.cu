// Whatever is done to each value by itself; threads take values in strides.

KERNEL(narrow)(u16 *out, const float *x, i64 count) {
    for (i64 i = global_index(); i < count; i += global_stride()) out[i] = to_bf16(x[i]);
}
EXPORT(narrow)

// Widens what a file stores: 0 for half, 1 for bfloat16, 2 for single precision.
KERNEL(widen)(float *out, const void *x, int kind, i64 count) {
    for (i64 i = global_index(); i < count; i += global_stride()) {
        if (kind == 2) out[i] = ((const float *)x)[i];
        else out[i] = kind == 0 ? from_f16(((const u16 *)x)[i]) : from_bf16(((const u16 *)x)[i]);
    }
}
EXPORT(widen)

KERNEL(add_bias)(float *y, const float *bias, i64 rows, int cols) {
    i64 count = rows * cols;
    for (i64 i = global_index(); i < count; i += global_stride()) y[i] += bias[i % cols];
}
EXPORT(add_bias)

__device__ __forceinline__ float gate_of(
    const float *gate, const float *up, const float *gate_bias, const float *up_bias, int kind, Numbers of, i64 i,
    int col) {
    float g = gate[i] + (gate_bias ? gate_bias[col] : 0.0f);
    float value = activation_of(kind, g, of);
    if (!up) return value;
    float u = up[i] + (up_bias ? up_bias[col] : 0.0f);
    if (kind == 5 || kind == 9) u = u < -of.b ? -of.b : u > of.b ? of.b : u;
    if (kind == 5) u += of.c;
    return value * u;
}

// out ← act(gate + bias) · (up + bias); `out` may be `gate`, and `up` nothing.
KERNEL(activate)(
    float *out, const float *gate, const float *up, const float *gate_bias, const float *up_bias, int kind, float a,
    float b, float c, float d, i64 rows, int cols) {
    i64 count = rows * cols;
    Numbers of = {a, b, c, d};
    for (i64 i = global_index(); i < count; i += global_stride())
        out[i] = gate_of(gate, up, gate_bias, up_bias, kind, of, i, (int)(i % cols));
}
EXPORT(activate)

// The same, rounded to bfloat16.
KERNEL(activate_rounded)(
    u16 *out, const float *gate, const float *up, const float *gate_bias, const float *up_bias, int kind, float a,
    float b, float c, float d, i64 rows, int cols) {
    i64 count = rows * cols;
    Numbers of = {a, b, c, d};
    for (i64 i = global_index(); i < count; i += global_stride())
        out[i] = to_bf16(gate_of(gate, up, gate_bias, up_bias, kind, of, i, (int)(i % cols)));
}
EXPORT(activate_rounded)

KERNEL(select_rows)(float *out, const float *in, const u32 *rows, i64 count, int cols) {
    i64 all = count * cols;
    for (i64 i = global_index(); i < all; i += global_stride()) out[i] = in[(i64)rows[i / cols] * cols + i % cols];
}
EXPORT(select_rows)

// y[rows[i]] += weights[i] · x[i]; rows are distinct.
KERNEL(add_rows)(float *y, const float *x, const u32 *rows, const float *weights, i64 count, int cols) {
    i64 all = count * cols;
    for (i64 i = global_index(); i < all; i += global_stride()) {
        i64 row = i / cols;
        y[(i64)rows[row] * cols + i % cols] += weights[row] * x[i];
    }
}
EXPORT(add_rows)

KERNEL(scale_sides)(float *m, const float *rows, const float *cols, i64 height, int width) {
    i64 count = height * width;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        float value = m[i];
        if (rows) value *= rows[i / width];
        if (cols) value *= cols[i % width];
        m[i] = value;
    }
}
EXPORT(scale_sides)

// Sets the flag if a value is a NaN or an infinity; whoever sets it sets the same.
KERNEL(find_not_finite)(int *flag, const float *x, i64 count) {
    bool found = false;
    for (i64 i = global_index(); i < count; i += global_stride()) found |= !(x[i] * 0.0f == 0.0f);
    if (found) *flag = 1;
}
EXPORT(find_not_finite)

KERNEL(join_heads)(float *out, const float *own, const float *shared, i64 tokens, int heads, int a, int b) {
    i64 count = tokens * heads * (a + b);
    for (i64 i = global_index(); i < count; i += global_stride()) {
        int within = (int)(i % (a + b));
        i64 head = i / (a + b);
        out[i] = within < a ? own[head * a + within] : shared[head / heads * b + within - a];
    }
}
EXPORT(join_heads)

// Each value `width` times.
KERNEL(spread_heads)(float *out, const float *x, i64 count, int width) {
    for (i64 i = global_index(); i < count; i += global_stride()) out[i] = x[i / width];
}
EXPORT(spread_heads)

// tanh by the CPU backend's polynomial.
__device__ __forceinline__ float tanh_as_cpu(float x) {
    float s = x * x;
    float p = -5.7049757e-3f;
    p = p * s + 2.0639077e-2f;
    p = p * s - 5.373971e-2f;
    p = p * s + 1.3331442e-1f;
    p = p * s - 3.333328e-1f;
    float small = p * s * x + x;
    float large = copysignf(1.0f - 2.0f / (exp_as_cpu(2.0f * fabsf(x)) + 1.0f), x);
    return fabsf(x) < 0.625f ? small : large;
}

KERNEL(softcap)(float *x, float cap, i64 count) {
    for (i64 i = global_index(); i < count; i += global_stride()) x[i] = cap * tanh_as_cpu(x[i] / cap);
}
EXPORT(softcap)

KERNEL(clamp_all)(float *x, float limit, i64 count) {
    for (i64 i = global_index(); i < count; i += global_stride()) {
        float value = x[i];
        x[i] = value < -limit ? -limit : value > limit ? limit : value;
    }
}
EXPORT(clamp_all)

KERNEL(add_scaled)(float *y, const float *x, float factor, i64 count) {
    for (i64 i = global_index(); i < count; i += global_stride()) y[i] += factor * x[i];
}
EXPORT(add_scaled)

KERNEL(difference)(float *out, const float *a, const float *b, i64 count) {
    for (i64 i = global_index(); i < count; i += global_stride()) out[i] = a[i] - b[i];
}
EXPORT(difference)
