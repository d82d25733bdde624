// Layer norm, and sums over rows. The formulas are those of layer_norm in reference.py. The backward pass gets x, mean and rstd
// instead of xhat.

extern "C" __global__ void layer_norm_forward(
    const T* x, const A* weight, const A* bias, T* y, A* mean, A* rstd, long long n, long long c, double eps) {
    long long row = row_of_warp();
    if (row >= n) return;
    x += row * c;
    y += row * c;
    A sum = 0, squares = 0;
    for (long long i = lane(); i < c; i += WARP) sum += (A)x[i];
    A m = warp_sum(sum) / (A)c;
    for (long long i = lane(); i < c; i += WARP) squares += ((A)x[i] - m) * ((A)x[i] - m);
    A r = 1 / sqrt(warp_sum(squares) / (A)c + (A)eps);
    for (long long i = lane(); i < c; i += WARP) {
        A value = ((A)x[i] - m) * r * weight[i];
        y[i] = (T)(bias ? value + bias[i] : value);
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
    dx += row * c;
    A m = mean[row], r = rstd[row], sum_g = 0, sum_g_xhat = 0;
    for (long long i = lane(); i < c; i += WARP) {
        A g = (A)dy[i] * weight[i];
        sum_g += g;
        sum_g_xhat += g * ((A)x[i] - m) * r;
    }
    A mean_g = warp_sum(sum_g) / (A)c, mean_g_xhat = warp_sum(sum_g_xhat) / (A)c;
    for (long long i = lane(); i < c; i += WARP) {
        A xhat = ((A)x[i] - m) * r;
        dx[i] = (T)(r * ((A)dy[i] * weight[i] - mean_g - xhat * mean_g_xhat));
    }
}

// A thread adds up one column over chunk blockIdx.y. partial is (chunks, 2, c): the weight's gradients, then the bias's.
extern "C" __global__ void layer_norm_backward_weight(
    const T* dy, const T* x, const A* mean, const A* rstd, A* partial, long long n, long long c, long long chunk) {
    long long column = thread_number();
    if (column >= c) return;
    long long first = blockIdx.y * chunk, last = first + chunk < n ? first + chunk : n;
    A dweight = 0, dbias = 0;
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
    for (long long row = first; row < last; row++) sum += (A)x[row * c + column];
    partial[blockIdx.y * c + column] = sum;
}

// y (c,) = the sum over the rows of x (n, c), from the first row to the last. A thread adds up one column.
extern "C" __global__ void sum_of_rows(const A* x, A* y, long long n, long long c) {
    for (long long column = thread_number(); column < c; column += thread_count()) {
        A sum = 0;
        for (long long row = 0; row < n; row++) sum += x[row * c + column];
        y[column] = sum;
    }
}
