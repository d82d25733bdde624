// Layer norm. The formulas are those of layer_norm in reference.py. The backward pass gets x, mean and rstd instead of xhat.
// This file follows common.cu and sums.cu.
//
// A warp works on several rows, one after the other. Short rows stay in its registers; long rows, and rows that begin at other
// addresses than multiples of 16 bytes, are read again for each pass. Kernels named wide are for more than 512 columns: they
// need more registers, so fewer of their blocks run at the same time.

const int MOST_GROUPS = sizeof(A) > 4 ? 2 : 4;  // of a short row, for each thread

// What a thread has of a row of c elements: every 32nd group. What is past the end is 0.
template <int N>
struct ThreadColumns {
    Group at[N];

    __device__ void load(const T* row, long long c) {
        #pragma unroll
        for (int i = 0; i < N; i++) {
            at[i] = {};
            if (first(i) < c) at[i].load_whole(row + first(i));
        }
    }

    __device__ void store(T* row, long long c) const {
        #pragma unroll
        for (int i = 0; i < N; i++)
            if (first(i) < c) at[i].store_whole(row + first(i));
    }

    __device__ static long long first(int i) { return i * BLOCK_COLUMNS + lane() * GROUP; }
};

// The number of groups of a short row, for each thread; 0 if rows of c elements, in arrays like x and y, are not short.
__device__ inline int groups_of_a_short_row(const T* x, const T* y, long long c) {
    bool are_whole = c % GROUP == 0 && ((unsigned long long)x | (unsigned long long)y) % 16 == 0;
    return are_whole && c <= MOST_GROUPS * BLOCK_COLUMNS ? (int)((c + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS) : 0;
}

// ---------------------------------------------------------------- forward

template <int N>
__device__ void forward_of_short_rows(
    const T* x, const A* weight, const A* bias, T* y, A* mean, A* rstd, long long n, long long c, A eps) {
    for (long long row = row_of_warp(); row < n; row += thread_count() / WARP) {
        ThreadColumns<N> part;
        part.load(x + row * c, c);
        A sum = 0, squares = 0;
        #pragma unroll
        for (int i = 0; i < N; i++)
            #pragma unroll
            for (int j = 0; j < GROUP; j++) sum += part.at[i].at[j];
        A m = warp_sum(sum) / (A)c;
        #pragma unroll
        for (int i = 0; i < N; i++)
            #pragma unroll
            for (int j = 0; j < GROUP; j++) {
                A& value = part.at[i].at[j];
                value -= m;
                squares += ThreadColumns<N>::first(i) < c ? value * value : (A)0;
            }
        A r = 1 / sqrt(warp_sum(squares) / (A)c + eps);
        #pragma unroll
        for (int i = 0; i < N; i++) {
            long long first = ThreadColumns<N>::first(i);
            Group factors, added;  // read again for each row: they are in the L1 cache, and registers are short
            factors.load(weight + first, c - first);
            added.load(bias + first, bias ? c - first : 0);
            #pragma unroll
            for (int j = 0; j < GROUP; j++) part.at[i].at[j] = part.at[i].at[j] * r * factors.at[j] + added.at[j];
        }
        part.store(y + row * c, c);
        if (lane() == 0) {
            mean[row] = m;
            rstd[row] = r;
        }
    }
}

__device__ inline void forward_of_long_rows(
    const T* x, const A* weight, const A* bias, T* y, A* mean, A* rstd, long long n, long long c, A eps) {
    for (long long row = row_of_warp(); row < n; row += thread_count() / WARP) {
        const T* from = x + row * c;
        A sum = 0, squares = 0;
        for (long long i = lane(); i < c; i += WARP) sum += (A)from[i];
        A m = warp_sum(sum) / (A)c;
        for (long long i = lane(); i < c; i += WARP) squares += ((A)from[i] - m) * ((A)from[i] - m);
        A r = 1 / sqrt(warp_sum(squares) / (A)c + eps);
        for (long long i = lane(); i < c; i += WARP)
            y[row * c + i] = (T)(((A)from[i] - m) * r * weight[i] + (bias ? bias[i] : (A)0));
        if (lane() == 0) {
            mean[row] = m;
            rstd[row] = r;
        }
    }
}

// For short rows of which a thread has FEWEST groups, or one more.
template <int FEWEST>
__device__ void forward(const T* x, const A* weight, const A* bias, T* y, A* mean, A* rstd, long long n, long long c, A eps) {
    int groups = groups_of_a_short_row(x, y, c);
    if (FEWEST <= MOST_GROUPS && groups == FEWEST)
        forward_of_short_rows<FEWEST>(x, weight, bias, y, mean, rstd, n, c, eps);
    else if (FEWEST <= MOST_GROUPS && groups == FEWEST + 1)
        forward_of_short_rows<FEWEST + 1>(x, weight, bias, y, mean, rstd, n, c, eps);
    else
        forward_of_long_rows(x, weight, bias, y, mean, rstd, n, c, eps);
}

extern "C" __global__ void layer_norm_forward(
    const T* x, const A* weight, const A* bias, T* y, A* mean, A* rstd, long long n, long long c, double eps) {
    forward<1>(x, weight, bias, y, mean, rstd, n, c, eps);
}

extern "C" __global__ void layer_norm_forward_wide(
    const T* x, const A* weight, const A* bias, T* y, A* mean, A* rstd, long long n, long long c, double eps) {
    forward<3>(x, weight, bias, y, mean, rstd, n, c, eps);
}

// ---------------------------------------------------------------- backward
//
// A block works on the rows from `first` to `last`. It also adds up what they give to the gradients of weight and bias, and
// writes that to its own (2, c) of partial.

template <int N>
__device__ void backward_of_short_rows(
    const T* dy, const T* x, const A* weight, const A* mean, const A* rstd, T* dx, A* partial, ColumnSums sums[2],
    long long first, long long last, long long c) {
    Group dweight[N] = {}, dbias[N] = {};
    for (long long row = first + threadIdx.x / WARP; row < last; row += blockDim.x / WARP) {
        ThreadColumns<N> gradient, part;
        gradient.load(dy + row * c, c);
        part.load(x + row * c, c);
        A m = mean[row], r = rstd[row], sum_g = 0, sum_g_xhat = 0;
        #pragma unroll
        for (int i = 0; i < N; i++) {
            Group factors;
            factors.load(weight + ThreadColumns<N>::first(i), c - ThreadColumns<N>::first(i));
            #pragma unroll
            for (int j = 0; j < GROUP; j++) {
                A d = gradient.at[i].at[j], g = d * factors.at[j], xhat = (part.at[i].at[j] - m) * r;  // d is 0 past the end
                sum_g += g;
                sum_g_xhat += g * xhat;
                dweight[i].at[j] += d * xhat;
                dbias[i].at[j] += d;
                gradient.at[i].at[j] = g;
                part.at[i].at[j] = xhat;
            }
        }
        A mean_g = warp_sum(sum_g) / (A)c, mean_g_xhat = warp_sum(sum_g_xhat) / (A)c;
        #pragma unroll
        for (int i = 0; i < N; i++)
            #pragma unroll
            for (int j = 0; j < GROUP; j++)
                part.at[i].at[j] = r * (gradient.at[i].at[j] - mean_g - part.at[i].at[j] * mean_g_xhat);
        part.store(dx + row * c, c);
    }
    #pragma unroll
    for (int i = 0; i < N; i++) {
        sums[0].add_up(dweight[i]);
        sums[1].add_up(dbias[i]);
        for (int column = threadIdx.x; column < BLOCK_COLUMNS && i * BLOCK_COLUMNS + column < c; column += blockDim.x) {
            partial[i * BLOCK_COLUMNS + column] = sums[0].of_warp[0][column];
            partial[c + i * BLOCK_COLUMNS + column] = sums[1].of_warp[0][column];
        }
        __syncthreads();
    }
}

__device__ inline void backward_of_long_rows(
    const T* dy, const T* x, const A* weight, const A* mean, const A* rstd, T* dx, A* partial, long long first, long long last,
    long long c) {
    for (long long row = first + threadIdx.x / WARP; row < last; row += blockDim.x / WARP) {
        const T *gradient = dy + row * c, *values = x + row * c;
        A m = mean[row], r = rstd[row], sum_g = 0, sum_g_xhat = 0;
        for (long long i = lane(); i < c; i += WARP) {
            A g = (A)gradient[i] * weight[i];
            sum_g += g;
            sum_g_xhat += g * ((A)values[i] - m) * r;
        }
        A mean_g = warp_sum(sum_g) / (A)c, mean_g_xhat = warp_sum(sum_g_xhat) / (A)c;
        for (long long i = lane(); i < c; i += WARP)
            dx[row * c + i] = (T)(r * ((A)gradient[i] * weight[i] - mean_g - ((A)values[i] - m) * r * mean_g_xhat));
    }
    for (long long i = threadIdx.x; i < c; i += blockDim.x) {
        A dweight = 0, dbias = 0;
        for (long long row = first; row < last; row++) {
            A d = (A)dy[row * c + i];
            dweight += d * ((A)x[row * c + i] - mean[row]) * rstd[row];
            dbias += d;
        }
        partial[i] = dweight;
        partial[c + i] = dbias;
    }
}

template <int FEWEST>
__device__ void backward(
    const T* dy, const T* x, const A* weight, const A* mean, const A* rstd, T* dx, A* partial, long long n, long long c,
    long long chunk, ColumnSums sums[2]) {
    long long first = blockIdx.x * chunk, last = first + chunk < n ? first + chunk : n;
    partial += 2 * blockIdx.x * c;
    int groups = groups_of_a_short_row(dy, x, c);  // dx comes from an allocator: it begins at a multiple of 16 bytes
    if (FEWEST <= MOST_GROUPS && groups == FEWEST)
        backward_of_short_rows<FEWEST>(dy, x, weight, mean, rstd, dx, partial, sums, first, last, c);
    else if (FEWEST <= MOST_GROUPS && groups == FEWEST + 1)
        backward_of_short_rows<FEWEST + 1>(dy, x, weight, mean, rstd, dx, partial, sums, first, last, c);
    else
        backward_of_long_rows(dy, x, weight, mean, rstd, dx, partial, first, last, c);
}

extern "C" __global__ void layer_norm_backward(
    const T* dy, const T* x, const A* weight, const A* mean, const A* rstd, T* dx, A* partial, long long n, long long c,
    long long chunk) {
    __shared__ ColumnSums sums[2];
    backward<1>(dy, x, weight, mean, rstd, dx, partial, n, c, chunk, sums);
}

extern "C" __global__ void layer_norm_backward_wide(
    const T* dy, const T* x, const A* weight, const A* mean, const A* rstd, T* dx, A* partial, long long n, long long c,
    long long chunk) {
    __shared__ ColumnSums sums[2];
    backward<3>(dy, x, weight, mean, rstd, dx, partial, n, c, chunk, sums);
}
