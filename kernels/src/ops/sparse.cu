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
    int local, int pooled, int entries) {
    __shared__ int room[8];
    __shared__ int above[256], equal[256];
    int row = blockIdx.x, query = position + row, thread = threadIdx.x;
    // Of a block that is not whole nothing is there to be read.
    int there = entries ? (query + 1) / block : query / block + 1;
    float *to = out + (first + row) * width + offset;
    const float *from = scores + row * keys;
    // Of blocks with one key, only those that are whole are chosen, and one that is not is seen besides.
    int count = slots - (pooled && !entries && (query + 1) % block == 0);
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

// Attention of one query of one head: a warp for each, whose lanes take a token each for the scores, and columns of the values for their mixture. A query
// sees the last `near` tokens up to its own, and what was chosen for it; with `entries` those of whole blocks of tokens that were chosen, or all where
// nothing was. A sink is a score without a value. `places` has the position of each query and the first token of its sequence.
KERNEL(attend_chosen)(
    float *out, const float *q, const float *k, const float *v, const float *entries, const float *chosen, const float *sinks, const int *places, i64 tokens,
    int heads, int kv_heads, int head_dim, int value_dim, float scale, int groups, int count, int block, int near) {
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
    const float *far = entries + (start * kv_heads + kv_head) * head_dim;
    float top = sinks ? sinks[head] : -INFINITE, total = sinks ? 1.0f : 0.0f, mixed[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) mixed[c] = 0.0f;
    int window = min(near, position + 1), whole = (position + 1) / block;
    int slots = window + (!entries ? count * block : chosen ? count : whole);
    for (int base = 0; base < slots; base += WARP) {
        // Entries are told from tokens by numbers below 0: −1 − the token where they stand.
        int slot = base + lane, other = slot - window, key = position + 1;
        if (slot < window) {
            key = position + 1 - window + slot;
        } else if (slot < slots && entries) {
            float index = chosen ? row[other] : (float)other;
            if (index >= 0.0f) key = -((int)index + 1) * block;
        } else if (slot < slots) {
            float index = row[other / block];
            if (index >= 0.0f) key = (int)index * block + other % block;
        }
        float score = -INFINITE;
        if (key <= position) {
            const float *at = key < 0 ? far + (i64)(-1 - key) * kv_heads * head_dim : keys + (i64)key * kv_heads * head_dim;
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
            const float *value = from < 0 ? far + (i64)(-1 - from) * kv_heads * head_dim : values + (i64)from * kv_heads * value_dim;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                if (col + c * WARP < value_dim) mixed[c] = fmaf(share, value[col + c * WARP], mixed[c]);
        }
    }
    float whole_sum = 1.0f / total;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
        if (writes && col + c * WARP < value_dim) out[task * value_dim + col + c * WARP] = mixed[c] * whole_sum;
}
EXPORT(attend_chosen)

// out[last token of a block, c] = Σ softmax(gates + places)[t, c] · x[t, c] over its tokens; a thread for each block and channel. With `overlap` over
// those of the block before it, too, if there is one: they have the first half of the columns, and its own tokens the second. `starts` has the first token
// of each block, and whether one is before it.
KERNEL(pool_blocks)(
    float *out, const float *x, const float *gates, const float *places, const u32 *starts, i64 blocks, int channels, int block, int overlap) {
    i64 count = blocks * channels;
    int cols = overlap ? 2 * channels : channels;
    for (i64 i = global_index(); i < count; i += global_stride()) {
        int channel = (int)(i % channels), before = overlap && starts[2 * (i / channels) + 1] ? block : 0;
        i64 start = starts[2 * (i / channels)], at = (start - before) * cols;
        float top = -INFINITE, sum = 0.0f, total = 0.0f;
        for (int pass = 0; pass < 2; pass++) {
            for (int t = 0; t < before + block; t++) {
                int own = t < before ? channel : cols - channels + channel;
                float logit = gates[at + (i64)t * cols + own] + places[(t < before ? t : t - before) * cols + own];
                if (pass == 0) {
                    top = fmaxf(top, logit);
                } else {
                    float power = exp_as_cpu(logit - top);
                    total += power;
                    sum += power * x[at + (i64)t * cols + own];
                }
            }
        }
        out[(start + block - 1) * channels + channel] = sum / total;
    }
}
EXPORT(pool_blocks)
