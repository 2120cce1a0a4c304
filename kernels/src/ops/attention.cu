// Attention that never holds more scores than a tile's: a block takes 64 queries of one head, goes through the keys they
// see and keeps, for each query, the largest score so far, the sum of its weights and their mixture of values (Dao et al. 2022,
// arXiv:2205.14135).
//
// `tiles` says what blocks take, three numbers each: where the sequence starts among the tokens, how long it is, and the first
// query. A window or a chunk of 0 is none, and so is a cap of 0. A token sees `ahead` positions after its own.

#define QUERIES 64

#define ATTENTION(T)                                                                                                        \
    T *out, const T *q, const T *k, const T *v, const float *sinks, const int *tiles, int heads, int kv_heads, int head_dim, \
        int value_dim, float scale, float cap, int window, int chunk, int ahead
#define ATTENTION_GIVEN out, q, k, v, sinks, tiles, heads, kv_heads, head_dim, value_dim, scale, cap, window, chunk, ahead

__device__ __forceinline__ int first_seen(int position, int window, int chunk) {
    int first = 0;
    if (window) first = max(first, position + 1 - window);
    if (chunk) first = max(first, position / chunk * chunk);
    return first;
}

// Single precision: 128 threads, of which each has 8 queries by 4 of a tile's 64 keys, and then 8 queries by COLS values.
//
// Queries, keys and values come in slices of 16 terms through two buffers: one slice is used while the next is under way in
// registers, with one barrier each.

#define DEPTH 16
// Values of a row of a slice, padded: rows written at once start in different banks.
#define PITCH (QUERIES + 4)

template <int COLS>
__device__ __forceinline__ void attend_whole(ATTENTION(float)) {
    const int WIDE = 16 * COLS, TAKEN = DEPTH * WIDE / 128;
    __shared__ __align__(16) float stage[2][2 * DEPTH * PITCH];
    __shared__ __align__(16) float weights[64 * PITCH];
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    // Four rows by eight terms to a warp: whole sectors are read, and every bank is written once.
    int own_row = threadIdx.x / 32 * 4 + threadIdx.x % 4, own_depth = threadIdx.x % 32 / 4;
    const int *tile = tiles + 3 * (blockIdx.x / heads);
    int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads), col = blockIdx.y * WIDE;
    int query = tile[2], last = min(query + QUERIES, tile[1]) - 1;
    // The last position that some query of the block sees.
    int end = tile[1] - 1, reach = min(last + ahead, end);
    int q_stride = heads * head_dim, k_stride = kv_heads * head_dim, v_stride = kv_heads * value_dim;
    i64 start = tile[0];
    q += (start + query) * q_stride + head * head_dim;
    k += start * k_stride + kv_head * head_dim;
    v += start * v_stride + kv_head * value_dim + col;
    int slices = max((head_dim + DEPTH - 1) / DEPTH, 1);

    float next[16];
    // Of the tile at hand; how far a row lies from them fits 32 bits.
    const float *keys, *values;
    auto fetch_pair = [&](int base, int slice) {
        keys = k + base * (i64)k_stride;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = own_row + 16 * i;
            int from = min(row, last - query) * q_stride, key = min(row, reach - base) * k_stride;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int depth = slice * DEPTH + 8 * half + own_depth;
                next[4 * i + half] = depth < head_dim ? q[from + depth] : 0.0f;
                next[4 * i + half + 2] = depth < head_dim ? keys[key + depth] : 0.0f;
            }
        }
    };
    auto put_pair = [&](float *to) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = (8 * half + own_depth) * PITCH + own_row + 16 * i;
                to[at] = next[4 * i + half];
                to[DEPTH * PITCH + at] = next[4 * i + half + 2];
            }
    };
    // Weights lie so that threads write them without conflicts: slice c has keys c, 4 + c, 8 + c …
    auto fetch_values = [&](int base, int slice) {
        values = v + base * (i64)v_stride;
#pragma unroll
        for (int i = 0; i < TAKEN; i++) {
            int at = threadIdx.x + 128 * i;
            int from = min(4 * (at / WIDE) + slice, reach - base) * v_stride;
            next[i] = col + at % WIDE < value_dim ? values[from + at % WIDE] : 0.0f;
        }
    };
    auto put_values = [&](float *to) {
#pragma unroll
        for (int i = 0; i < TAKEN; i++) to[threadIdx.x + 128 * i] = next[i];
    };

    float top[8], total[8], mixed[8][COLS];
    float sink = sinks ? sinks[head] : -INFINITE, inner = cap != 0.0f ? scale / cap : scale;
#pragma unroll
    for (int r = 0; r < 8; r++) {
        top[r] = sink;
        // One of the sixteen threads that share a query counts the sink.
        total[r] = tx == 0 && sink != -INFINITE ? 1.0f : 0.0f;
#pragma unroll
        for (int c = 0; c < COLS; c++) mixed[r][c] = 0.0f;
    }
    int begin = first_seen(query, window, chunk), full = first_seen(last, window, chunk), step = 0;
    fetch_pair(begin, 0);
#pragma unroll 1
    for (int base = begin; base <= reach; base += 64) {
        float score[8][4];
#pragma unroll
        for (int r = 0; r < 8; r++)
#pragma unroll
            for (int c = 0; c < 4; c++) score[r][c] = 0.0f;
#pragma unroll 1
        for (int slice = 0; slice < slices; slice++) {
            float *at = stage[step++ & 1];
            put_pair(at);
            __syncthreads();
            if (slice + 1 < slices) fetch_pair(base, slice + 1);
#pragma unroll 8
            for (int d = 0; d < DEPTH; d++) {
                float4 a0 = *(const float4 *)(at + d * PITCH + 8 * ty), a1 = *(const float4 *)(at + d * PITCH + 8 * ty + 4);
                float4 b0 = *(const float4 *)(at + (DEPTH + d) * PITCH + 4 * tx);
                float a[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w}, b[4] = {b0.x, b0.y, b0.z, b0.w};
#pragma unroll
                for (int r = 0; r < 8; r++)
#pragma unroll
                    for (int c = 0; c < 4; c++) score[r][c] = fmaf(a[r], b[c], score[r][c]);
            }
        }
        // Whether some query of the block does not see some key of the tile.
        bool edge = base + 63 > min(query + ahead, end) || base < full;
#pragma unroll
        for (int r = 0; r < 8; r++) {
            int position = query + 8 * ty + r, first = edge ? first_seen(position, window, chunk) : 0;
            int furthest = min(position + ahead, end);
            float largest = -INFINITE;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                float s = score[r][c] * inner;
                if (cap != 0.0f) s = cap * tanhf(s);
                int key = base + 4 * tx + c;
                if (edge && (key > furthest || key < first)) s = -INFINITE;
                score[r][c] = s;
                largest = fmaxf(largest, s);
            }
#pragma unroll
            for (int lanes = 8; lanes > 0; lanes >>= 1) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
            largest = fmaxf(largest, top[r]);
            // A query that has seen nothing yet has no largest score.
            float origin = largest == -INFINITE ? 0.0f : largest;
            float kept = expf(top[r] - origin), sum = 0.0f;
            top[r] = largest;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                score[r][c] = expf(score[r][c] - origin);
                sum += score[r][c];
            }
            total[r] = fmaf(total[r], kept, sum);
#pragma unroll
            for (int c = 0; c < COLS; c++) mixed[r][c] *= kept;
        }
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float *to = weights + (16 * c + tx) * PITCH + 8 * ty;
            *(float4 *)to = make_float4(score[0][c], score[1][c], score[2][c], score[3][c]);
            *(float4 *)(to + 4) = make_float4(score[4][c], score[5][c], score[6][c], score[7][c]);
        }
        fetch_values(base, 0);
#pragma unroll 1
        for (int slice = 0; slice < 4; slice++) {
            float *at = stage[step++ & 1];
            put_values(at);
            __syncthreads();
            if (slice + 1 < 4) fetch_values(base, slice + 1);
            else if (base + 64 <= reach) fetch_pair(base + 64, 0);
#pragma unroll 8
            for (int d = 0; d < DEPTH; d++) {
                const float *weight = weights + (16 * slice + d) * PITCH + 8 * ty;
                float4 a0 = *(const float4 *)weight, a1 = *(const float4 *)(weight + 4);
                float a[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
#pragma unroll
                for (int part = 0; part < COLS / 4; part++) {
                    float4 b0 = *(const float4 *)(at + d * WIDE + 64 * part + 4 * tx);
                    float b[4] = {b0.x, b0.y, b0.z, b0.w};
#pragma unroll
                    for (int r = 0; r < 8; r++)
#pragma unroll
                        for (int c = 0; c < 4; c++) mixed[r][4 * part + c] = fmaf(a[r], b[c], mixed[r][4 * part + c]);
                }
            }
        }
    }
    i64 stride = heads * value_dim;
#pragma unroll
    for (int r = 0; r < 8; r++) {
        float sum = total[r];
#pragma unroll
        for (int lanes = 8; lanes > 0; lanes >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
        float whole = 1.0f / sum;
        int row = 8 * ty + r;
        float *to = out + (start + query + row) * stride + head * value_dim;
#pragma unroll
        for (int c = 0; c < COLS; c++) {
            int at = col + 64 * (c / 4) + 4 * tx + c % 4;
            if (row <= last - query && at < value_dim) to[at] = mixed[r][c] * whole;
        }
    }
}

KERNEL(__launch_bounds__(128) attend_whole_64)(ATTENTION(float)) { attend_whole<4>(ATTENTION_GIVEN); }
EXPORT(attend_whole_64)
KERNEL(__launch_bounds__(128) attend_whole_128)(ATTENTION(float)) { attend_whole<8>(ATTENTION_GIVEN); }
EXPORT(attend_whole_128)

// Tensor cores: four warps of 16 queries each, heads of up to D terms and V values in bfloat16, tiles of KEYS keys. Weights are
// rounded to bfloat16 in registers, where they already lie as a left operand; their sum is of the unrounded ones.
//
// Values are under way while scores are computed, the next keys while values are mixed.

#define LOG2_E 1.44269504f

// Bytes of a row of a tile in shared memory: an odd number of sixteens, so that eight rows lie in different banks.
template <int D>
__device__ __forceinline__ constexpr int pitch() { return 2 * D + 16; }

// Starts to copy rows; those beyond the last position are copies of it, and columns beyond `width` are 0.
template <int D, int ROWS>
__device__ __forceinline__ void load_rows(unsigned char *to, const u16 *from, int stride, int width, int first, int last) {
    from += first * (i64)stride;
#pragma unroll 2
    for (int i = 0; i < ROWS * D / 8 / 128; i++) {
        int at = threadIdx.x + 128 * i, row = at / (D / 8), part = at % (D / 8);
        unsigned char *place = to + row * pitch<D>() + 16 * part;
        if (8 * part < width) copy_async(place, from + (min(row, last - first) * stride + 8 * part));
        else *(uint4 *)place = make_uint4(0, 0, 0, 0);
    }
    copy_commit();
}

template <int D, int V, int KEYS>
__device__ __forceinline__ void attend_rounded(ATTENTION(u16)) {
    // Queries stay in registers where there is room for them.
    const bool HELD = D <= 128;
    static_assert(!HELD || (V >= D && KEYS == QUERIES), "queries come through the room of the values");
    SHARED_DYNAMIC(room);
    unsigned char *keys = room + (HELD ? 0 : QUERIES * pitch<D>()), *values = keys + KEYS * pitch<D>();
    unsigned char *queries = HELD ? values : room;
    int lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16;
    const int *tile = tiles + 3 * (blockIdx.x / heads);
    int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    int query = tile[2], last = min(query + QUERIES, tile[1]) - 1;
    // The last position that some query of the block sees.
    int end = tile[1] - 1, reach = min(last + ahead, end);
    int q_stride = heads * head_dim, k_stride = kv_heads * head_dim, v_stride = kv_heads * value_dim;
    i64 start = tile[0];
    q += start * q_stride + head * head_dim;
    k += start * k_stride + kv_head * head_dim;
    v += start * v_stride + kv_head * value_dim;
    int begin = first_seen(query, window, chunk), full = first_seen(last, window, chunk);

    load_rows<D, QUERIES>(queries, q, q_stride, head_dim, query, last);
    load_rows<D, KEYS>(keys, k, k_stride, head_dim, begin, reach);
    // Where this lane's row of four 8 × 8 matrices begins: of a left operand, of keys, of values.
    const unsigned char *left = queries + (own + lane % 16) * pitch<D>() + lane / 16 * 16;
    const unsigned char *key_row = keys + (lane % 8 + lane / 16 * 8) * pitch<D>() + lane / 8 % 2 * 16;
    const unsigned char *value_row = values + lane % 16 * pitch<V>() + lane / 16 * 16;
    u32 held[HELD ? D / 16 : 1][4];
    copy_wait<1>();
    __syncthreads();
    if (HELD) {
#pragma unroll
        for (int d = 0; d < D / 16; d++) load_matrices(held[HELD ? d : 0], left + 32 * d);
    }

    // This lane has queries lane / 4 and 8 after it. Scores are taken times log2 e, for the sake of 2ˣ.
    float top[2], total[2], mixed[V / 8][4];
    float factor = cap != 0.0f ? LOG2_E : scale * LOG2_E, sink = sinks ? sinks[head] * LOG2_E : -INFINITE;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = sink;
        total[r] = lane % 4 == 0 && sink != -INFINITE ? 1.0f : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < V / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) mixed[n][i] = 0.0f;
#pragma unroll 1
    for (int base = begin; base <= reach; base += KEYS) {
        // The keys are there, and nobody reads the values of the tile before any more.
        copy_wait<0>();
        __syncthreads();
        load_rows<V, KEYS>(values, v, v_stride, value_dim, base, reach);
        float score[KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) score[n][i] = 0.0f;
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            u32 fresh[4];
            if (!HELD) load_matrices(fresh, left + 32 * d);
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                u32 b[4];
                load_matrices(b, key_row + 16 * n * pitch<D>() + 32 * d);
                mma_bf16(score[2 * n], HELD ? held[HELD ? d : 0] : fresh, b);
                mma_bf16(score[2 * n + 1], HELD ? held[HELD ? d : 0] : fresh, b + 2);
            }
        }
        if (cap != 0.0f) {
            // cap · tanh(scale · s / cap)
            float twice = 2.0f * LOG2_E * scale / cap;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    score[n][i] = cap - __fdividef(2.0f * cap, fast_exp2(score[n][i] * twice) + 1.0f);
        }
        bool edge = base + KEYS - 1 > min(query + ahead, end) || base < full;
        if (edge) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int position = query + own + lane / 4 + 8 * r, first = first_seen(position, window, chunk);
                int furthest = min(position + ahead, end);
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        int key = base + 8 * n + 2 * (lane % 4) + i;
                        if (key > furthest || key < first) score[n][2 * r + i] = -INFINITE;
                    }
            }
        }
        float kept[2];
        // As left operands of 16 × 16.
        u32 weights[KEYS / 16][4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float largest = -INFINITE;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) largest = fmaxf(largest, fmaxf(score[n][2 * r], score[n][2 * r + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
            largest = fmaxf(largest * factor, top[r]);
            float origin = largest == -INFINITE ? 0.0f : largest;
            kept[r] = fast_exp2(top[r] - origin);
            top[r] = largest;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                float first = fast_exp2(fmaf(score[n][2 * r], factor, -origin));
                float second = fast_exp2(fmaf(score[n][2 * r + 1], factor, -origin));
                sum += first + second;
                weights[n / 2][n % 2 * 2 + r] = pack_bf16(first, second);
            }
            total[r] = fmaf(total[r], kept[r], sum);
        }
        // After the first tiles the largest score seldom changes.
        if (__any_sync(ALL_LANES, kept[0] != 1.0f || kept[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < V / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) mixed[n][i] *= kept[i / 2];
        }
        // The values are there, and nobody reads the keys any more.
        copy_wait<0>();
        __syncthreads();
        if (base + KEYS <= reach) load_rows<D, KEYS>(keys, k, k_stride, head_dim, base + KEYS, reach);
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
#pragma unroll
            for (int d = 0; d < V / 16; d++) {
                u32 b[4];
                load_transposed(b, value_row + 16 * n * pitch<V>() + 32 * d);
                mma_bf16(mixed[2 * d], weights[n], b);
                mma_bf16(mixed[2 * d + 1], weights[n], b + 2);
            }
        }
    }
    int stride = heads * value_dim;
    out += (start + query) * (i64)stride + head * value_dim;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = total[r];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        float whole = 1.0f / sum;
        int row = own + lane / 4 + 8 * r;
        u16 *to = out + row * stride;
#pragma unroll
        for (int n = 0; n < V / 8; n++) {
            int at = 8 * n + 2 * (lane % 4);
            if (row <= last - query && at < value_dim)
                *(u32 *)(to + at) = pack_bf16(mixed[n][2 * r] * whole, mixed[n][2 * r + 1] * whole);
        }
    }
}

// Older cards never run these.
#if defined(QUANTC_ON_CPU) || __CUDA_ARCH__ >= 800
#define ATTEND_ROUNDED(name, d, v, keys, blocks) \
    KERNEL(__launch_bounds__(128, blocks) name)(ATTENTION(u16)) { attend_rounded<d, v, keys>(ATTENTION_GIVEN); }
#else
#define ATTEND_ROUNDED(name, d, v, keys, blocks) \
    KERNEL(name)(ATTENTION(u16)) {}
#endif
ATTEND_ROUNDED(attend_rounded_64, 64, 64, 64, 4)
EXPORT(attend_rounded_64)
ATTEND_ROUNDED(attend_rounded_96, 96, 96, 64, 3)
EXPORT(attend_rounded_96)
ATTEND_ROUNDED(attend_rounded_128, 128, 128, 64, 2)
EXPORT(attend_rounded_128)
ATTEND_ROUNDED(attend_rounded_192, 192, 128, 64, 3)
EXPORT(attend_rounded_192)
ATTEND_ROUNDED(attend_rounded_256, 256, 256, 32, 2)
EXPORT(attend_rounded_256)
