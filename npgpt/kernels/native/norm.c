// Layer norm, and sums over rows. The formulas are those of layer_norm in reference.py. The backward pass gets x, mean and rstd
// instead of xhat.

void NAME(layer_norm_forward)(
    const float *x, const float *weight, const float *bias, float *y, float *mean, float *rstd, int64_t n, int64_t c,
    double eps) {
    for (int64_t row = 0; row < n; row++, x += c, y += c) {
        vec total = splat(0), squares = splat(0);
        for (int64_t i = 0; i < c; i += LANES) total += load_some(x + i, c - i, 0);
        float m = sum_of(total) / c;
        for (int64_t i = 0; i < c; i += LANES) {
            vec centred = load_some(x + i, c - i, m) - m;
            squares += centred * centred;
        }
        float r = 1 / __builtin_sqrtf(sum_of(squares) / c + (float)eps);
        for (int64_t i = 0; i < c; i += LANES) {
            vec value = (load_some(x + i, c - i, 0) - m) * r * load_some(weight + i, c - i, 0);
            store_some(y + i, c - i, bias ? value + load_some(bias + i, c - i, 0) : value);
        }
        mean[row] = m;
        rstd[row] = r;
    }
}

// Sums over the rows, from the first to the last, are added to dweight and dbias.
void NAME(layer_norm_backward)(
    const float *dy, const float *x, const float *weight, const float *mean, const float *rstd, float *dx, float *dweight,
    float *dbias, int64_t n, int64_t c) {
    for (int64_t row = 0; row < n; row++, dy += c, x += c, dx += c) {
        float m = mean[row], r = rstd[row];
        vec sum_g = splat(0), sum_g_xhat = splat(0);
        for (int64_t i = 0; i < c; i += LANES) {
            vec d = load_some(dy + i, c - i, 0), xhat = (load_some(x + i, c - i, m) - m) * r;
            vec g = d * load_some(weight + i, c - i, 0);
            sum_g += g;
            sum_g_xhat += g * xhat;
            store_some(dweight + i, c - i, load_some(dweight + i, c - i, 0) + d * xhat);
            store_some(dbias + i, c - i, load_some(dbias + i, c - i, 0) + d);
        }
        float mean_g = sum_of(sum_g) / c, mean_g_xhat = sum_of(sum_g_xhat) / c;
        for (int64_t i = 0; i < c; i += LANES) {
            vec xhat = (load_some(x + i, c - i, m) - m) * r;
            vec g = load_some(dy + i, c - i, 0) * load_some(weight + i, c - i, 0);
            store_some(dx + i, c - i, r * (g - mean_g - xhat * mean_g_xhat));
        }
    }
}

#define ROWS_AT_ONCE 256  // of a sum: sums of sums round less than one long sum

// y (c,) += the sum over the rows of x (n, c), from the first to the last.
void NAME(add_column_sums)(const float *x, float *y, int64_t n, int64_t c) {
    for (int64_t first = 0; first < n; first += ROWS_AT_ONCE) {
        const int64_t last = n - first < ROWS_AT_ONCE ? n : first + ROWS_AT_ONCE;
        for (int64_t i = 0; i < c; i += LANES) {
            vec sum = splat(0);
            for (int64_t row = first; row < last; row++) sum += load_some(x + row * c + i, c - i, 0);
            store_some(y + i, c - i, load_some(y + i, c - i, 0) + sum);
        }
    }
}

// table[ids[row]] += dy[row] for each row of dy (n, c), from the first to the last. table has rows of c numbers.
void NAME(embedding_backward)(const float *dy, const int64_t *ids, float *table, int64_t n, int64_t c) {
    for (int64_t row = 0; row < n; row++, dy += c) {
        float *sum = table + ids[row] * c;
        for (int64_t i = 0; i < c; i++) sum[i] += dy[i];
    }
}
