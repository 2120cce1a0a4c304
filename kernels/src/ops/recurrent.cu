// Layers with a state: short convolutions, decays, and linear attention whose state forgets.

// y[t, c] = act(bias[c] + Σ weight[c, j] · x[t − taps + 1 + j, c]) within sequences, of whose tokens `positions` says which they are; a thread
// for each value. `kind` is that of an activation, with its numbers, or −1.
KERNEL(convolve)(
    float *y, const float *x, const float *weight, const float *bias, const u32 *positions, i64 tokens, int channels, int taps, int kind,
    float a, float b, float c, float d) {
    i64 count = tokens * channels;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        int channel = (int)(i % channels), position = (int)positions[i / channels];
        float sum = bias ? bias[channel] : 0.0f;
        for (int back = position < taps ? position : taps - 1; back >= 0; back--)
            sum += weight[channel * taps + taps - 1 - back] * x[i - (i64)back * channels];
        y[i] = kind < 0 ? sum : activation_of(kind, sum, Numbers{a, b, c, d});
    }
}
EXPORT(convolve)

// x ← −rates · clamp(ln(1 + exp(x + bias))), for each column a rate and a bias.
KERNEL(decays)(float *x, const float *rates, const float *bias, i64 rows, int cols, float least, float most) {
    i64 count = rows * cols;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        int col = (int)(i % cols);
        float shifted = x[i] + bias[col];
        float positive = shifted < 0.0f ? 0.0f : shifted;
        float step = positive + log1pf(exp_as_cpu(-fabsf(shifted)));
        step = step < least ? least : step;
        x[i] = -rates[col] * (step > most ? most : step);
    }
}
EXPORT(decays)

// x ← lower · σ(rates · (x + bias)), for each column a rate and a bias.
KERNEL(bounded_decays)(float *x, const float *rates, const float *bias, i64 rows, int cols, float lower) {
    i64 count = rows * cols;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        int col = (int)(i % cols);
        x[i] = lower / sigmoid_of(rates[col] * (x[i] + bias[col]));
    }
}
EXPORT(bounded_decays)

// The most values of a state's column that one thread holds.
#define HELD 32

// The sum over groups of `lanes` neighbouring threads of a warp, a power of two, in each of them.
__device__ __forceinline__ float group_sum(float value, int lanes) {
    for (int step = lanes / 2; step > 0; step >>= 1) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// The gated delta rule, or with `replaces` 0 a state that is only added to, token by token. A block has a head of a sequence (blockIdx.x) and some columns of its state (blockIdx.y); `lanes`
// threads hold a column, of which thread l has the values l, l + lanes, … So columns need nothing of each other, and the state stays in
// registers. Decays are those of heads, or of each of their channels. `sequences` has the first token and the number of tokens of each.
KERNEL(delta_rule)(
    float *out, const float *q, const float *k, const float *v, const float *decay, const float *beta, const int *sequences,
    int key_heads, int value_heads, int key_dim, int value_dim, int lanes, float scale, int replaces, int by_channel) {
    int head = blockIdx.x % value_heads, sequence = blockIdx.x / value_heads;
    int start = sequences[2 * sequence], length = sequences[2 * sequence + 1];
    int lane = threadIdx.x % lanes, col = blockIdx.y * (blockDim.x / lanes) + threadIdx.x / lanes;
    int key_head = head / (value_heads / key_heads);
    // Threads beyond the last column work on it too, and write nothing: every lane takes part in the sums.
    bool writes = lane == 0 && col < value_dim;
    int column = col < value_dim ? col : value_dim - 1;
    float state[HELD], keys[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) state[i] = 0.0f;
    for (int token = start; token < start + length; token++) {
        const float *query = q + ((i64)token * key_heads + key_head) * key_dim;
        const float *key = k + ((i64)token * key_heads + key_head) * key_dim;
        i64 at = (i64)token * value_heads + head;
        float kept = by_channel ? 0.0f : exp_as_cpu(decay[at]), held = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            int d = lane + i * lanes;
            keys[i] = d < key_dim ? key[d] : 0.0f;
            state[i] *= by_channel && d < key_dim ? exp_as_cpu(decay[at * key_dim + d]) : kept;
            held += state[i] * keys[i];
        }
        held = replaces ? group_sum(held, lanes) : 0.0f;
        float change = beta[at] * (v[at * value_dim + column] - held), read = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            int d = lane + i * lanes;
            state[i] += keys[i] * change;
            read += d < key_dim ? state[i] * query[d] : 0.0f;
        }
        read = group_sum(read, lanes);
        if (writes) out[at * value_dim + col] = scale * read;
    }
}
EXPORT(delta_rule)
