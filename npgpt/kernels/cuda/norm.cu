// Layer norm, and sums over rows. The formulas are those of layer_norm in reference.py. The backward pass gets x, mean and rstd
// instead of xhat.

const int MAX_WARPS = 32;  // of a block

extern "C" __global__ void layer_norm_forward(
    const T* x, const A* weight, const A* bias, T* y, A* mean, A* rstd, long long n, long long c, double eps) {
    long long row = row_of_warp();
    if (row >= n) return;
    x += row * c;
    A sum = 0, squares = 0;
    Group values, factors, added;
    for (long long first = lane() * GROUP; first < c; first += WARP * GROUP) {
        values.load(x + first, c - first);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) sum += values.at[j];  // elements past the end are 0
    }
    A m = warp_sum(sum) / (A)c;
    for (long long first = lane() * GROUP; first < c; first += WARP * GROUP) {
        values.load(x + first, c - first);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) squares += first + j < c ? (values.at[j] - m) * (values.at[j] - m) : (A)0;
    }
    A r = 1 / sqrt(warp_sum(squares) / (A)c + (A)eps);
    for (long long first = lane() * GROUP; first < c; first += WARP * GROUP) {
        values.load(x + first, c - first);
        factors.load(weight + first, c - first);
        added.load(bias + first, bias ? c - first : 0);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) values.at[j] = (values.at[j] - m) * r * factors.at[j] + added.at[j];
        values.store(y + row * c + first, c - first);
    }
    if (lane() == 0) {
        mean[row] = m;
        rstd[row] = r;
    }
}

extern "C" __global__ void layer_norm_backward(
    const T* dy, const T* x, const A* weight, const A* mean, const A* rstd, T* dx, long long n, long long c) {
    long long row = row_of_warp();
    if (row >= n) return;
    dy += row * c;
    x += row * c;
    A m = mean[row], r = rstd[row], sum_g = 0, sum_g_xhat = 0;
    Group gradient, values, factors;
    for (long long first = lane() * GROUP; first < c; first += WARP * GROUP) {
        gradient.load(dy + first, c - first);  // 0 past the end
        values.load(x + first, c - first);
        factors.load(weight + first, c - first);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) {
            A g = gradient.at[j] * factors.at[j];
            sum_g += g;
            sum_g_xhat += g * (values.at[j] - m) * r;
        }
    }
    A mean_g = warp_sum(sum_g) / (A)c, mean_g_xhat = warp_sum(sum_g_xhat) / (A)c;
    for (long long first = lane() * GROUP; first < c; first += WARP * GROUP) {
        gradient.load(dy + first, c - first);
        values.load(x + first, c - first);
        factors.load(weight + first, c - first);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) {
            A xhat = (values.at[j] - m) * r;
            values.at[j] = r * (gradient.at[j] * factors.at[j] - mean_g - xhat * mean_g_xhat);
        }
        values.store(dx + row * c + first, c - first);
    }
}

// A thread adds up one column over chunk blockIdx.y. partial is (chunks, 2, c): the weight's gradients, then the bias's.
extern "C" __global__ void layer_norm_backward_weight(
    const T* dy, const T* x, const A* mean, const A* rstd, A* partial, long long n, long long c, long long chunk) {
    long long column = thread_number();
    if (column >= c) return;
    long long first = blockIdx.y * chunk, last = first + chunk < n ? first + chunk : n;
    A dweight = 0, dbias = 0;
    #pragma unroll 8  // so that several loads are under way at once, here and below
    for (long long row = first; row < last; row++) {
        A d = (A)dy[row * c + column];
        dweight += d * ((A)x[row * c + column] - mean[row]) * rstd[row];
        dbias += d;
    }
    partial[2 * blockIdx.y * c + column] = dweight;
    partial[(2 * blockIdx.y + 1) * c + column] = dbias;
}

// The sum over each chunk of rows of x (n, c). partial is (chunks, c). A thread adds up one column of chunk blockIdx.y.
extern "C" __global__ void column_sums(const T* x, A* partial, long long n, long long c, long long chunk) {
    long long column = thread_number();
    if (column >= c) return;
    long long first = blockIdx.y * chunk, last = first + chunk < n ? first + chunk : n;
    A sum = 0;
    #pragma unroll 8
    for (long long row = first; row < last; row++) sum += (A)x[row * c + column];
    partial[blockIdx.y * c + column] = sum;
}

// y (c,) = the sum over the rows of x (n, c), plus what y holds if `add`. The rows are `stride` apart; x begins at `offset`.
//
// A block adds up as many columns as a warp has threads. Each of its warps adds up some of the rows.
extern "C" __global__ void sum_of_rows(
    const A* x, A* y, long long n, long long c, long long stride, long long offset, long long add) {
    __shared__ A of_warp[MAX_WARPS][WARP];
    int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    long long column = blockIdx.x * (long long)WARP + lane();
    A sum = 0;
    if (column < c) {
        #pragma unroll 8
        for (long long row = warp; row < n; row += warps) sum += x[row * stride + offset + column];
    }
    of_warp[warp][lane()] = sum;
    __syncthreads();
    if (warp > 0 || column >= c) return;
    for (int i = 1; i < warps; i++) sum += of_warp[i][lane()];
    y[column] = add ? y[column] + sum : sum;
}
