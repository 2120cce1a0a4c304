// Attention to a choice of tokens: scores of an indexer's heads, the blocks of the best scores, and attention to these.

// sum[r, key] ← keep · sum[r, key] + weights[(first + r) · heads + head] · max(part[r, key], 0); a thread for each value.
KERNEL(add_scores)(float *sum, const float *part, const float *weights, i64 first, i64 rows, i64 keys, int heads, int head, int keep) {
    i64 count = rows * keys;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        float x = part[i], weight = weights[(first + i / keys) * heads + head];
        float term = weight * (x > 0.0f ? x : 0.0f);
        // 0 beside it makes −0 of a negative weight one of all zeros.
        sum[i] = (keep ? sum[i] : 0.0f) + term;
    }
}
EXPORT(add_scores)

// Numbers in the order of the floats that they are made of.
__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The sum over the block of one number of each thread, in all of them; `room` has a place for each warp.
__device__ __forceinline__ int block_sum(int value, int *room) {
    for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(ALL_LANES, value, step);
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = value;
    __syncthreads();
    int sum = 0;
    for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) sum += room[warp];
    __syncthreads();
    return sum;
}

// Of the query at `position + blockIdx.x` of a sequence, whose scores with all earlier tokens `scores` [rows, keys] has, the `count` blocks of
// the best scores, in `out` from (first + blockIdx.x) · width + offset on, ascending; −1 where fewer are there. 256 threads take a stretch of the blocks
// each. The threshold is found bit by bit: the largest number that `count` blocks reach. Of the blocks that equal it the first are taken.
KERNEL(__launch_bounds__(256) choose)(
    float *out, const float *scores, i64 first, int position, i64 keys, int width, int offset, int slots, int block,
    int local, int pooled) {
    __shared__ int room[8];
    __shared__ int above[256], equal[256];
    int row = blockIdx.x, query = position + row, there = query / block + 1, thread = threadIdx.x;
    float *to = out + (first + row) * width + offset;
    const float *from = scores + row * keys;
    // Of blocks with one key, only those that are whole are chosen, and one that is not is seen besides.
    int count = slots - (pooled && (query + 1) % block == 0);
    if (count < slots && thread == 0) to[slots - 1] = -1.0f;
    if (there <= count) {
        for (int i = thread; i < count; i += 256) to[i] = i < there ? (float)i : -1.0f;
    } else {
        int share = (there + 255) / 256, begin = min(thread * share, there), end = min(begin + share, there);
        auto best = [&](int index) -> u32 {
            if (index + local >= there) return 0xFFFFFFFFu;
            if (pooled) return (index + 1) * block > query + 1 ? 0xFFFFFFFFu : ordered(from[(index + 1) * block - 1] + 0.0f);
            float top = -INFINITE;
            for (int key = index * block; key < min((index + 1) * block, query + 1); key++) top = fmaxf(top, from[key]);
            // −0 is no less than 0.
            return ordered(top + 0.0f);
        };
        u32 threshold = 0;
        for (int bit = 31; bit >= 0; bit--) {
            u32 next = threshold | 1u << bit;
            int reach = 0;
            for (int index = begin; index < end; index++) reach += best(index) >= next;
            if (block_sum(reach, room) >= count) threshold = next;
        }
        int more = 0, same = 0;
        for (int index = begin; index < end; index++) {
            u32 own = best(index);
            more += own > threshold;
            same += own == threshold;
        }
        above[thread] = more;
        equal[thread] = same;
        int left = count - block_sum(more, room), place = 0, passed = 0;
        for (int other = 0; other < thread; other++) {
            place += above[other] + max(min(equal[other], left - passed), 0);
            passed += equal[other];
        }
        for (int index = begin; index < end; index++) {
            u32 own = best(index);
            if (own > threshold || (own == threshold && passed < left)) to[place++] = (float)index;
            passed += own == threshold;
        }
    }
}
EXPORT(choose)

// The most columns of values that a lane sums up.
#define COLUMNS 4

// Attention of one query of one head to what was chosen for it: a warp for each, whose lanes take a token each for the scores, and columns of the
// values for their mixture. A sink is a score without a value. `places` has the position of each query and the first token of its sequence.
KERNEL(attend_chosen)(
    float *out, const float *q, const float *k, const float *v, const float *chosen, const float *sinks, const int *places, i64 tokens, int heads, int kv_heads,
    int head_dim, int value_dim, float scale, int groups, int count, int block) {
    i64 task = (i64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP, col = blockIdx.y * WARP * COLUMNS + lane;
    // Warps beyond the last task do it once more, and write nothing.
    bool writes = task < tokens * heads;
    if (!writes) task = tokens * heads - 1;
    i64 token = task / heads;
    int head = (int)(task % heads), kv_head = head / (heads / kv_heads), group = head / (heads / groups);
    int position = places[2 * token];
    i64 start = places[2 * token + 1];
    const float *query = q + task * head_dim, *row = chosen + token * groups * count + group * count;
    const float *keys = k + (start * kv_heads + kv_head) * head_dim, *values = v + (start * kv_heads + kv_head) * value_dim;
    float top = sinks ? sinks[head] : -INFINITE, total = sinks ? 1.0f : 0.0f, mixed[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) mixed[c] = 0.0f;
    for (int base = 0; base < count * block; base += WARP) {
        int slot = base + lane;
        float index = slot < count * block ? row[slot / block] : -1.0f;
        int key = index >= 0.0f ? (int)index * block + slot % block : position + 1;
        float score = -INFINITE;
        if (key <= position) {
            const float *at = keys + (i64)key * kv_heads * head_dim;
            float sum = 0.0f;
            for (int d = 0; d < head_dim; d++) sum = fmaf(query[d], at[d], sum);
            score = sum * scale;
        }
        float largest = score;
        for (int step = 16; step > 0; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, step));
        largest = fmaxf(largest, top);
        // Nothing was seen yet, as nothing is behind the last choice.
        float origin = largest == -INFINITE ? 0.0f : largest;
        float kept = expf(top - origin), weight = expf(score - origin), sum = weight;
        top = largest;
        for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, step);
        total = fmaf(total, kept, sum);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) mixed[c] *= kept;
        for (int other = 0; other < WARP; other++) {
            float share = __shfl_sync(ALL_LANES, weight, other);
            int from = __shfl_sync(ALL_LANES, key, other);
            if (share == 0.0f) continue;
            const float *value = values + (i64)from * kv_heads * value_dim;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                if (col + c * WARP < value_dim) mixed[c] = fmaf(share, value[col + c * WARP], mixed[c]);
        }
    }
    float whole = 1.0f / total;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
        if (writes && col + c * WARP < value_dim) out[task * value_dim + col + c * WARP] = mixed[c] * whole;
}
EXPORT(attend_chosen)

// out[last token of a block, c] = Σ softmax(gates + places)[t, c] · x[t, c] over its tokens; a thread for each block and channel.
KERNEL(pool_blocks)(float *out, const float *x, const float *gates, const float *places, const u32 *starts, i64 blocks, int channels, int block) {
    i64 count = blocks * channels;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        int channel = (int)(i % channels);
        i64 at = (i64)starts[i / channels] * channels + channel;
        float top = -INFINITE, sum = 0.0f, total = 0.0f;
        for (int t = 0; t < block; t++) top = fmaxf(top, gates[at + (i64)t * channels] + places[t * channels + channel]);
        for (int t = 0; t < block; t++) {
            float power = exp_as_cpu(gates[at + (i64)t * channels] + places[t * channels + channel] - top);
            total += power;
            sum += power * x[at + (i64)t * channels];
        }
        out[at + (i64)(block - 1) * channels] = sum / total;
    }
}
EXPORT(pool_blocks)
