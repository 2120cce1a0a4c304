// Losses of tokens, a block for each row of logits. Exponentials are single precision, sums of more than a few are double.

// The largest of a row and the first place where it stands, in every thread.
__device__ __forceinline__ float largest(const float *row, int count, int *place) {
    __shared__ float tops[32];
    __shared__ int places[32];
    float top = -INFINITE;
    int at = 0x7fffffff;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        if (row[i] > top) {
            top = row[i];
            at = i;
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
        float other = __shfl_xor_sync(ALL_LANES, top, step);
        int other_at = __shfl_xor_sync(ALL_LANES, at, step);
        if (other > top || (other == top && other_at < at)) {
            top = other;
            at = other_at;
        }
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0) {
        tops[threadIdx.x / WARP] = top;
        places[threadIdx.x / WARP] = at;
    }
    __syncthreads();
    for (int i = 0; i < blockDim.x / WARP; i++) {
        if (i == 0 || tops[i] > top || (tops[i] == top && places[i] < at)) {
            top = tops[i];
            at = places[i];
        }
    }
    *place = at == 0x7fffffff ? 0 : at;
    return top;
}

// Values of a thread that are summed in single precision.
#define SINGLES 16

__device__ __forceinline__ double sum_exp(const float *row, int count, float top) {
    __shared__ double scratch[32];
    double total = 0.0;
    float part = 0.0f;
    int held = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        part += exp_as_cpu(row[i] - top);
        if (++held == SINGLES) {
            total += part;
            part = 0.0f;
            held = 0;
        }
    }
    return block_sum(total + part, scratch);
}

KERNEL(token_loss)(const float *logits, const u32 *targets, double *nll, u32 *argmax, int vocabulary) {
    const float *row = logits + (i64)blockIdx.x * vocabulary;
    int place;
    float top = largest(row, vocabulary, &place);
    double sum = sum_exp(row, vocabulary, top);
    if (threadIdx.x == 0) {
        nll[blockIdx.x] = log(sum) + (double)top - (double)row[targets[blockIdx.x]];
        argmax[blockIdx.x] = place;
    }
}
EXPORT(token_loss)

// KL(p || q) of each row: Σ p (l_p − l_q) − (ln Z_p − ln Z_q), logits taken from their maxima.
KERNEL(divergence)(const float *reference, const float *model, double *kld, int vocabulary) {
    __shared__ double scratch[32];
    const float *p = reference + (i64)blockIdx.x * vocabulary, *q = model + (i64)blockIdx.x * vocabulary;
    int place;
    float top_p = largest(p, vocabulary, &place);
    float top_q = largest(q, vocabulary, &place);
    double sum_p = sum_exp(p, vocabulary, top_p), sum_q = sum_exp(q, vocabulary, top_q);
    double total = 0.0;
    float part = 0.0f;
    int held = 0;
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) {
        part += exp_as_cpu(p[i] - top_p) * ((p[i] - top_p) - (q[i] - top_q));
        if (++held == SINGLES) {
            total += part;
            part = 0.0f;
            held = 0;
        }
    }
    total = block_sum(total + part, scratch);
    if (threadIdx.x == 0) kld[blockIdx.x] = total / sum_p - (log(sum_p) - log(sum_q));
}
EXPORT(divergence)
