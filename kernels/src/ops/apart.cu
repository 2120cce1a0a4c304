// Scales (and mins) that blocks store themselves: what apart.rs does, to the bit.
//
// Half a warp has a block, be it a group of a row, a row, or a tile that reaches over rows: lane l takes the values l, l + 16, … of it, row
// by row, from memory anew for each scale that is tried.

#define LANES 16

struct Apart {
    const float *weight;
    // Null where columns count alike.
    const float *importance;
    LevelSet set;
    i64 first;  // the block's first value
    int col;    // and its column
    int cols, width, count;
    int scale, min, has_min;
    float global;

    __device__ __forceinline__ float stored(float x) const { return round_scale(scale, x / global) * global; }
    __device__ __forceinline__ float stored_min(float x) const { return has_min ? round_scale(min, x) : 0.0f; }

    // `term` of each of the lane's values and of what its column counts.
    template <class F>
    __device__ __forceinline__ void each(F term) const {
        for (int i = threadIdx.x % LANES; i < count; i += LANES) {
            int row = count == width ? 0 : i / width, at = i - row * width;
            term(weight[first + (i64)row * cols + at], importance ? importance[col + at] : 1.0f);
        }
    }
};

// Over half a warp, in the order of `sum_lanes`; in every lane.
__device__ __forceinline__ float over_lanes(float value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step >>= 1) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// Σ h (x − scale · level + min)².
__device__ __forceinline__ float loss_of(const Apart &block, float scale, float min) {
    float inverse = inverse_of(scale), sum = 0.0f;
    block.each([&](float x, float h) {
        float e = x - (scale * nearest_level(block.set, (x + min) * inverse) - min);
        sum += h * e * e;
    });
    return over_lanes(sum);
}

// Scale and min of least squares for the levels that a scale and a min give; false where they say nothing.
__device__ __forceinline__ bool solved(const Apart &block, float inverse, float min, float *scale, float *offset) {
    float hl = 0.0f, hll = 0.0f, hlx = 0.0f, hx = 0.0f, hs = 0.0f;
    block.each([&](float x, float h) {
        float level = nearest_level(block.set, (x + min) * inverse), of_level = h * level;
        hl += of_level;
        hll += of_level * level;
        hlx += of_level * x;
        hx += h * x;
        hs += h;
    });
    double a = over_lanes(hl), b = over_lanes(hll), c = over_lanes(hlx), first = over_lanes(hx), weight = over_lanes(hs);
    if (!block.has_min) {
        *scale = (float)(c / b);
        *offset = 0.0f;
        return b > 0.0;
    }
    double determinant = weight * b - a * a;
    double s = (weight * c - first * a) / determinant, m = (a * c - b * first) / determinant;
    *scale = (float)s;
    *offset = (float)m;
    return determinant > 0.0 && s > 0.0;
}

// The best scale and min found so far.
struct Best {
    float loss, d, m;
};

__device__ __forceinline__ void consider(const Apart &block, Best &best, float scale, float min) {
    float d = block.stored(scale), m = block.stored_min(min), loss = loss_of(block, d, m);
    if (loss < best.loss) best = Best{loss, d, m};
}

KERNEL(fit_apart)(
    float *d, float *m, const float *weight, const float *importance, const LevelSet *set, i64 blocks, int rows, int cols, int groups,
    int width, int height, int searched, int scale, int min, int has_min, float global, float from, float to, int steps) {
    i64 index = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    bool real = index < blocks;
    // Lanes without a block of their own keep the others company.
    index = real ? index : blocks - 1;
    i64 tile = index / groups;
    int group = (int)(index % groups), col = group * width, top = (int)(tile * height);
    int own = cols - col < width ? cols - col : width, deep = rows - top < height ? rows - top : height;
    Apart block = {weight, importance, *set, (i64)top * cols + col, col, cols, own, own * deep, scale, min, has_min, global};
    float low = INFINITE, high = -INFINITE;
    block.each([&](float x, float) {
        low = fminf(low, x);
        high = fmaxf(high, x);
    });
#pragma unroll
    for (int step = LANES / 2; step > 0; step >>= 1) {
        low = fminf(low, __shfl_xor_sync(ALL_LANES, low, step));
        high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, step));
    }
    float top_level = block.set.high, most = fmaxf(block.set.high, -block.set.low), reach = fmaxf(fabsf(high), fabsf(low));
    Best best = {0.0f, 0.0f, 0.0f};
    if (!(low == 0.0f && high == 0.0f)) {
        float span = (high - low) / top_level;
        if (has_min && span > 0.0f) {
            // A level stands for zero.
            bool below = -low > high;
            float far = below ? -low : high, steps = rintf(far / span);
            best.d = block.stored(far / steps);
            best.m = block.stored_min(best.d * (below ? steps : top_level - steps));
        } else {
            best.d = has_min ? block.stored(span) : block.stored(reach / most);
            best.m = has_min ? block.stored_min(-low) : 0.0f;
        }
    }
    if (searched) {
        best.loss = loss_of(block, best.d, best.m);
        // What lanes of the same warp shuffle together they must all come to, so that a block that is done goes on and keeps what it has.
        bool open = best.loss > 0.0f && high - low > 0.0f;
        Best kept = best;
        float s, o;
        if (has_min) {
            float span = (high - low) / top_level, end = fminf(to, 1.05f);
            for (int step = 0; step <= steps; step++) {
                float inverse = 1.0f / (span * (from + (end - from) * (float)step / (float)steps));
                bool good = solved(block, inverse, -low, &s, &o);
                Best before = best;
                consider(block, best, s, o);
                if (!good) best = before;
            }
        } else if (scale == PRECISION_E8M0) {
            float plain = block.stored(reach / top_level);
            consider(block, best, plain * 0.5f, 0.0f);
            consider(block, best, plain, 0.0f);
            consider(block, best, plain * 2.0f, 0.0f);
        } else {
            float size = reach / most;
            for (int step = 0; step <= steps; step++) {
                float share = from + (to - from) * (float)step / (float)steps;
                consider(block, best, size * share, 0.0f);
                if (-block.set.low != top_level) consider(block, best, -size * share, 0.0f);
            }
        }
        bool done = false;
        for (int turn = 0; turn < 3; turn++) {
            Best before = best;
            bool good = solved(block, inverse_of(best.d), best.m, &s, &o);
            consider(block, best, s, o);
            if (done || !good) best = before;
            done = done || !good || !(best.loss < before.loss);
        }
        if (!open) best = kept;
    }
    if (!real || threadIdx.x % LANES != 0) return;
    for (int row = 0; row < deep; row++) {
        d[(i64)(top + row) * groups + group] = best.d;
        if (has_min) m[(i64)(top + row) * groups + group] = best.m;
    }
}
EXPORT(fit_apart)
