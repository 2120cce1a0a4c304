// The factorization P (H + damping) Pᵀ = R D Rᵀ. What the Cholesky factor is of has its indices reversed: row and column n − 1 − p
// are position p of the order.
//
// Everything exists in double and in single precision. On cards that have few units for doubles it is single, but for the blocks on
// the diagonal: these are factored in double precision all the same, as it is their pivots that cancel.

// Side of the blocks that one block of threads factors.
#define FACTOR_BLOCK 64

// The reversed, permuted, damped matrix: its lower triangle, zeros above. Columns without energy get a unit pivot. A block takes a
// row.
template <class T>
__device__ __forceinline__ void arrange_as(T *a, const float *gram, const u32 *order, double factor, int n) {
    int row = blockIdx.x;
    i64 from = order[n - 1 - row];
    for (int col = threadIdx.x; col < n; col += blockDim.x) {
        double value = 0.0;
        if (col <= row) {
            i64 to = order[n - 1 - col];
            value = gram[(from > to ? from : to) * n + (from > to ? to : from)];
            if (row == col) value = value <= 0.0 ? 1.0 : value * factor;
        }
        a[(i64)row * n + col] = (T)value;
    }
}
KERNEL(arrange)(double *a, const float *gram, const u32 *order, double factor, int n) { arrange_as(a, gram, order, factor, n); }
EXPORT(arrange)
KERNEL(arrange_single)(float *a, const float *gram, const u32 *order, double factor, int n) {
    arrange_as(a, gram, order, factor, n);
}
EXPORT(arrange_single)

// Factors the diagonal block of `side` rows at `start`, and inverts its factor into `inverse` [64, 64]. The first pivot that is
// not positive, counted from 1, goes to `failed`. One block of 256 threads.
template <class T>
__device__ __forceinline__ void factor_corner(T *a, T *inverse, int *failed, int start, int side, i64 n) {
    // Left of the column at work lies what has become of the identity, right of it what is not yet factored.
    __shared__ double s[FACTOR_BLOCK][FACTOR_BLOCK + 1];
    __shared__ double left[FACTOR_BLOCK], above[FACTOR_BLOCK];
    T *corner = a + start * (n + 1);
    for (int i = threadIdx.x; i < FACTOR_BLOCK * FACTOR_BLOCK; i += blockDim.x) {
        int row = i / FACTOR_BLOCK, col = i % FACTOR_BLOCK;
        s[row][col] = row < side && col <= row ? corner[row * n + col] : row == col ? 1.0 : 0.0;
    }
    __syncthreads();
    for (int j = 0; j < FACTOR_BLOCK; j++) {
        double pivot = s[j][j];
        bool good = pivot > 0.0 && pivot < (double)INFINITE;
        if (threadIdx.x == 0 && !good && *failed == 0) *failed = start + j + 1;
        double root = sqrt(pivot), reciprocal = 1.0 / root;
        int i = threadIdx.x % FACTOR_BLOCK;
        double below = i > j ? s[i][j] / root : root;
        if (threadIdx.x < FACTOR_BLOCK) {
            left[i] = below;
            if (i >= j && i < side && j < side) corner[i * n + j] = (T)below;
        } else if (threadIdx.x < 2 * FACTOR_BLOCK) {
            above[i] = i < j ? s[j][i] * reciprocal : i == j ? reciprocal : below;
        }
        __syncthreads();
        for (int k = threadIdx.x; k < FACTOR_BLOCK * FACTOR_BLOCK; k += blockDim.x) {
            int row = k / FACTOR_BLOCK, col = k % FACTOR_BLOCK;
            if (row < j || col > row || (row == j && col > j)) continue;
            if (row == j) s[row][col] = above[col];
            else s[row][col] = (col == j ? 0.0 : s[row][col]) - left[row] * above[col];
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < FACTOR_BLOCK * FACTOR_BLOCK; i += blockDim.x) {
        int row = i / FACTOR_BLOCK, col = i % FACTOR_BLOCK;
        inverse[i] = (T)(col <= row ? s[row][col] : 0.0);
    }
}
KERNEL(factor_block)(double *a, double *inverse, int *failed, int start, int side, i64 n) {
    factor_corner(a, inverse, failed, start, side, n);
}
EXPORT(factor_block)
KERNEL(factor_block_single)(float *a, float *inverse, int *failed, int start, int side, i64 n) {
    factor_corner(a, inverse, failed, start, side, n);
}
EXPORT(factor_block_single)

// Columns start .. start + 64 of `rows` rows from `first` ← panel [rows, 64].
template <class T>
__device__ __forceinline__ void place(T *a, const T *panel, int first, int start, i64 rows, i64 n) {
    i64 count = rows * FACTOR_BLOCK;
    for (i64 i = global_index(); i < count; i += global_stride())
        a[(first + i / FACTOR_BLOCK) * n + start + i % FACTOR_BLOCK] = panel[i];
}
KERNEL(place_panel)(double *a, const double *panel, int first, int start, i64 rows, i64 n) {
    place(a, panel, first, start, rows, n);
}
EXPORT(place_panel)
KERNEL(place_panel_single)(float *a, const float *panel, int first, int start, i64 rows, i64 n) {
    place(a, panel, first, start, rows, n);
}
EXPORT(place_panel_single)

// The pivots, and by what columns of the factor are divided.
template <class T>
__device__ __forceinline__ void pivots_from(double *pivots, double *inverse, const T *a, int n) {
    for (i64 p = global_index(); p < n; p += global_stride()) {
        double root = a[(n - 1 - p) * ((i64)n + 1)];
        pivots[p] = root * root;
        inverse[p] = 1.0 / root;
    }
}
KERNEL(pivots_of)(double *pivots, double *inverse, const double *a, int n) { pivots_from(pivots, inverse, a, n); }
EXPORT(pivots_of)
KERNEL(pivots_of_single)(double *pivots, double *inverse, const float *a, int n) { pivots_from(pivots, inverse, a, n); }
EXPORT(pivots_of_single)

// R, zeros on and below its diagonal; sets the flag where it is not finite. A block takes a row.
template <class T>
__device__ __forceinline__ void unit_from(float *unit, int *wild, const T *a, const double *inverse, int n) {
    int p = blockIdx.x;
    const T *row = a + (i64)(n - 1 - p) * n;
    bool found = false;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float value = i > p ? (float)(row[n - 1 - i] * inverse[i]) : 0.0f;
        found |= !(value * 0.0f == 0.0f);
        unit[(i64)p * n + i] = value;
    }
    if (found) *wild = 1;
}
KERNEL(unit_of)(float *unit, int *wild, const double *a, const double *inverse, int n) { unit_from(unit, wild, a, inverse, n); }
EXPORT(unit_of)
KERNEL(unit_of_single)(float *unit, int *wild, const float *a, const double *inverse, int n) {
    unit_from(unit, wild, a, inverse, n);
}
EXPORT(unit_of_single)
