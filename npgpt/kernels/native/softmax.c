// The exponentials of a softmax, and the cross-entropy.

// The largest of n elements that are not NaN; 0 if all are -inf. A NaN in a row makes the sum of its exponentials NaN.
static inline float largest_of_row(const float *from, int64_t n) {
    vec top = splat(-__builtin_inff());
    for (int64_t i = 0; i < n; i += LANES) top = larger(load_some(from + i, n - i, -__builtin_inff()), top);
    return largest_of(top) == -__builtin_inff() ? 0 : largest_of(top);
}

// to = exp(scale (from - largest)) for a row of n elements; to may be from. Returns the sum. A row of -inf becomes zeros.
static inline float exponentials_of_row(const float *from, float *to, int64_t n, float scale, float largest) {
    vec sum = splat(0);
    for (int64_t i = 0; i < n; i += LANES) {
        vec e = exponential((load_some(from + i, n - i, -__builtin_inff()) - largest) * scale);
        sum += e;
        store_some(to + i, n - i, e);
    }
    return sum_of(sum);
}

// losses[row] = log(sum(exp(logits[row]))) - logits[row, target], and p = softmax(logits), for logits (n, v).
void NAME(cross_entropy_forward)(
    const float *logits, const int64_t *targets, float *losses, float *p, int64_t n, int64_t v) {
    for (int64_t row = 0; row < n; row++, logits += v, p += v) {
        float largest = largest_of_row(logits, v), total = exponentials_of_row(logits, p, v, 1, largest), factor = 1 / total;
        for (int64_t i = 0; i < v; i++) p[i] *= factor;
        losses[row] = __builtin_logf(total) - (logits[targets[row]] - largest);
    }
}

// dlogits = dy (p - onehot(target)).
void NAME(cross_entropy_backward)(
    const float *dy, const float *p, const int64_t *targets, float *dlogits, int64_t n, int64_t v) {
    for (int64_t row = 0; row < n; row++, p += v, dlogits += v) {
        for (int64_t i = 0; i < v; i++) dlogits[i] = p[i] * dy[row];
        dlogits[targets[row]] -= dy[row];
    }
}
