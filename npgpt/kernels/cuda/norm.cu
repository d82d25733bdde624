// Layer norm. The formulas are those of layer_norm in reference.py. The backward pass gets x, mean and rstd instead of xhat.

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

// The gradients of weight and bias, which are added to what the arrays hold if `add`. See sums.cu for the grid.
extern "C" __global__ void layer_norm_backward_weight(
    const T* dy, const T* x, const A* mean, const A* rstd, A* dweight, A* dbias, A* partial, unsigned* arrived, long long n,
    long long c, long long chunk, long long add_weight, long long add_bias) {
    __shared__ Sums<2> sums;
    A* const results[2] = {dweight, dbias};
    const bool add[2] = {add_weight != 0, add_bias != 0};
    long long column = first_column(), first = blockIdx.y * chunk, last = first + chunk < n ? first + chunk : n;
    sums.add_up(first, last, [=](long long row, Group values[2]) {
        values[0].load(x + row * c + column, c - column);
        values[1].load(dy + row * c + column, c - column);
        A m = mean[row], r = rstd[row];
        #pragma unroll
        for (int j = 0; j < GROUP; j++) values[0].at[j] = values[1].at[j] * (values[0].at[j] - m) * r;
    });
    sums.finish(results, add, partial, arrived, c);
}
