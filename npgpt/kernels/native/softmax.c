// Softmax, fused with the operations around it: in causal attention, between its two products, and in the cross-entropy.
//
// A block of attention is `matrices` matrices of scores (rows, seen), for the queries start .. start + rows of n_query. Row r
// sees the keys 0 .. seen - rows + r.

// to = exp(from - largest) for a row of n elements; to may be from. Returns the sum. A row of -inf becomes zeros.
static inline float exponentials_of_row(const float *from, float *to, int64_t n, float *largest) {
    vec top = splat(-__builtin_inff()), sum = splat(0);
    for (int64_t i = 0; i < n; i += LANES) top = larger(load_some(from + i, n - i, -__builtin_inff()), top);
    *largest = largest_of(top) == -__builtin_inff() ? 0 : largest_of(top);
    for (int64_t i = 0; i < n; i += LANES) {
        vec e = exponential(load_some(from + i, n - i, -__builtin_inff()) - *largest);
        sum += e;
        store_some(to + i, n - i, e);
    }
    return sum_of(sum);
}

// scores -> e = exp(scores - the row's largest), 0 for future keys. factor (matrices, n_query) = 1 / (keep * the row's sum); it
// turns kept into probabilities, after dropout that keeps the share `keep`. A row of -inf has no distribution: its factor is 0.
//
// With draws (matrices, n_query, n_key), e keeps all exponentials, and a minus sign marks a dropped one; kept has zeros there. So
// one array holds both for the backward pass.
void NAME(attention_forward)(
    float *scores, float *kept, float *factor, const uint16_t *draws, int64_t matrices, int64_t rows, int64_t seen,
    int64_t start, int64_t n_query, int64_t n_key, int64_t threshold, double keep) {
    const int limit = threshold;
    for (int64_t matrix = 0; matrix < matrices; matrix++)
        for (int64_t row = 0; row < rows; row++) {
            int64_t n = seen - rows + row + 1, query = matrix * n_query + start + row;
            float *e = scores + (matrix * rows + row) * seen;
            float largest, total = (float)keep * exponentials_of_row(e, e, n, &largest);
            memset(e + n, 0, (seen - n) * sizeof(float));
            factor[query] = total == 0 ? 0 : 1 / total;
            if (!draws) continue;
            const uint16_t *drawn = draws + query * n_key;
            float *left = kept + (matrix * rows + row) * seen;
            for (int64_t i = 0; i < seen; i++) {
                float value = e[i];
                left[i] = drawn[i] >= limit ? value : 0.0f;
                e[i] = drawn[i] >= limit ? value : -value;
            }
        }
}

// kept = max(e, 0): e without the dropped elements.
void NAME(attention_kept)(const float *e, float *kept, int64_t n) {
    for (int64_t i = 0; i < n; i++) kept[i] = e[i] > 0 || e[i] != e[i] ? e[i] : 0.0f;
}

// dscores (matrices, rows, seen): max(e, 0) * dscores - |e| * row_term, in place; row_term is (matrices, n_query).
void NAME(attention_backward)(
    float *dscores, const float *e, const float *row_term, int64_t matrices, int64_t rows, int64_t seen, int64_t start,
    int64_t n_query) {
    for (int64_t matrix = 0; matrix < matrices; matrix++)
        for (int64_t row = 0; row < rows; row++) {
            float term = row_term[matrix * n_query + start + row];
            for (int64_t i = 0; i < seen; i++) {
                float kept = e[i] > 0 || e[i] != e[i] ? e[i] : 0.0f;
                dscores[i] = kept * dscores[i] - __builtin_fabsf(e[i]) * term;
            }
            dscores += seen;
            e += seen;
        }
}

// losses[row] = log(sum(exp(logits[row]))) - logits[row, target], and p = softmax(logits), for logits (n, v).
void NAME(cross_entropy_forward)(
    const float *logits, const int64_t *targets, float *losses, float *p, int64_t n, int64_t v) {
    for (int64_t row = 0; row < n; row++, logits += v, p += v) {
        float largest, total = exponentials_of_row(logits, p, v, &largest), factor = 1 / total;
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
