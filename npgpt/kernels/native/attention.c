// Causal attention of many heads, forward and backward, one head after the other. Its arrays stay in the second-level cache.
//
// A block of QUERIES sees the keys up to the block's end. Row r of a block of `rows` sees the first seen - rows + r + 1 of them. Let
// e = exp(scores - the row's largest score). The probabilities e / sum are never formed:
//
//   out = (mask * e) @ v * factor,   factor = 1 / (keep * the row's sum),   keep = 1 - dropout
//
// With g = dy * factor and term = factor * keep * sum(dy * out), one number for each row:
//
//   dv = (mask * e)^T @ g,   dscores = (mask * e) * (g @ v^T) - e * term
//   dq = scale * dscores @ k,   dk = scale * dscores^T @ q
//
// The backward pass needs e and the mask. One array holds both: e of a dropped element has a minus sign.

#define QUERIES 48

// Where the scratch memory of a head begins for each purpose. `a` is for multiply.
typedef struct {
    float *a, *along, *across, *scores, *kept, *g, *packed;
} head_scratch;

static inline head_scratch scratch_of(float *scratch, int64_t n_key, int64_t head_dim) {
    const int64_t width = rounded_up(head_dim, COLUMNS);
    head_scratch s = {.a = scratch};
    s.along = s.a + M_BLOCK * STEPS;                           // keys or values as columns, with head_dim steps
    s.across = s.along + rounded_up(n_key, COLUMNS) * head_dim;  // keys or values as rows: the steps
    s.scores = s.across + n_key * width;
    s.kept = s.scores + QUERIES * n_key;
    s.g = s.kept + QUERIES * n_key;
    s.packed = s.g + QUERIES * head_dim;
    return s;
}

// The bytes of scratch memory for attention to n_key keys.
int64_t NAME(attention_scratch)(int64_t n_key, int64_t head_dim) {
    const int64_t width = rounded_up(head_dim, COLUMNS), along = rounded_up(n_key, COLUMNS) * head_dim;
    return (M_BLOCK * STEPS + along + n_key * width + QUERIES * (2 * n_key + head_dim + width)) * (int64_t)sizeof(float);
}

// The elements of e for one head.
int64_t NAME(attention_exponentials)(int64_t n_query, int64_t n_key) {
    int64_t n = 0;
    for (int64_t start = 0; start < n_query; start += QUERIES) {
        const int64_t rows = smaller(n_query - start, QUERIES);
        n += rows * (n_key - n_query + start + rows);
    }
    return n;
}

int64_t NAME(longest_head)(void) { return STEPS; }

// Keys or values (n_key, head_dim) -> panels that have the keys as steps, STEPS of them at most in one panel.
static void pack_keys(matrix keys, int64_t n_key, int64_t head_dim, float *to) {
    for (int64_t p = 0; p < n_key; p += STEPS, to += STEPS * rounded_up(head_dim, COLUMNS))
        pack_columns(part(keys, p, 0), smaller(n_key - p, STEPS), head_dim, 0, to);
}

// out (rows, head_dim) = weights (rows, seen) @ keys, for the panels of pack_keys.
static void sum_over_keys(
    const float *weights, const float *keys, float *out, int64_t out_row, int64_t rows, int64_t seen, int64_t n_key,
    int64_t head_dim, float *packed_a) {
    for (int64_t p = 0; p < seen; p += STEPS, keys += STEPS * rounded_up(head_dim, COLUMNS))
        multiply(
            (matrix){weights + p, seen, 1}, keys, smaller(n_key - p, STEPS), 0, out, out_row, rows, head_dim,
            smaller(seen - p, STEPS), p > 0, packed_a, 0);
}

// Scores of a row -> e, of which the first n are not in the future; factor. draws and kept are NULL without dropout. Else kept
// becomes mask * e, and e gets its signs.
static void softmax_of_row(
    float *e, float *kept, const uint16_t *draws, int64_t n, int64_t seen, float scale, int limit, float keep, float *factor) {
    const float total = keep * exponentials_of_row(e, e, n, scale, largest_of_row(e, n));
    *factor = total == 0 ? 0 : 1 / total;  // a row of -inf has no distribution
    memset(e + n, 0, (seen - n) * sizeof(float));
    if (!kept) return;
    for (int64_t i = 0; i < seen; i++) {
        float value = e[i];
        kept[i] = draws[i] >= limit ? value : 0.0f;
        e[i] = draws[i] >= limit ? value : -value;
    }
}

// q (b, h, n_query, head_dim); k and v (b, h, n_key, head_dim); draws (b, h, n_query, n_key) or NULL; out (b, n_query, h, head_dim);
// factor (b, h, n_query). e holds the blocks of all heads. head_dim <= STEPS.
void NAME(attention_forward)(
    const float *q, const float *k, const float *v, const uint16_t *draws, float *e, float *factor, float *out, float *scratch,
    int64_t b, int64_t h, int64_t n_query, int64_t n_key, int64_t head_dim, int64_t q_batch, int64_t q_head, int64_t q_row,
    int64_t k_batch, int64_t k_head, int64_t k_row, int64_t threshold, double scale, double keep) {
    const head_scratch s = scratch_of(scratch, n_key, head_dim);
    for (int64_t head = 0; head < b * h; head++, out += head_dim) {
        const int64_t batch = head / h, at = batch * k_batch + head % h * k_head;
        const matrix queries = {q + batch * q_batch + head % h * q_head, q_row, 1};
        if (head % h == 0 && head) out += (n_query - 1) * h * head_dim;
        pack_columns((matrix){k + at, 1, k_row}, head_dim, n_key, 0, s.along);
        pack_keys((matrix){v + at, k_row, 1}, n_key, head_dim, s.across);
        for (int64_t start = 0; start < n_query; start += QUERIES) {
            const int64_t rows = smaller(n_query - start, QUERIES), seen = n_key - n_query + start + rows;
            multiply(part(queries, start, 0), s.along, head_dim, 0, e, seen, rows, seen, head_dim, 0, s.a, 0);
            for (int64_t r = 0; r < rows; r++) {
                const int64_t query = head * n_query + start + r;
                softmax_of_row(
                    e + r * seen, draws ? s.kept + r * seen : 0, draws ? draws + query * n_key : 0, seen - rows + r + 1, seen,
                    scale, threshold, keep, factor + query);
            }
            float *rows_out = out + start * h * head_dim;
            sum_over_keys(draws ? s.kept : e, s.across, rows_out, h * head_dim, rows, seen, n_key, head_dim, s.a);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < head_dim; i++) rows_out[r * h * head_dim + i] *= factor[head * n_query + start + r];
            e += rows * seen;
        }
    }
}

// g (rows, head_dim) and the terms of the rows; dy and out have rows that are `stride` apart.
static void gradient_of_rows(
    const float *dy, const float *out, int64_t stride, const float *factor, float keep, int64_t rows, int64_t head_dim, float *g,
    float *term) {
    for (int64_t r = 0; r < rows; r++, dy += stride, out += stride, g += head_dim) {
        vec sum = splat(0);
        for (int64_t i = 0; i < head_dim; i += LANES) {
            const int64_t left = head_dim - i;
            const vec gradient = load_some(dy + i, left, 0);
            sum += gradient * load_some(out + i, left, 0);
            store_some(g + i, left, gradient * factor[r]);
        }
        term[r] = sum_of(sum) * factor[r] * keep;
    }
}

// dprobabilities (n) of a row -> scale * dscores, in place; kept = mask * e.
static void softmax_backward_of_row(float *ds, const float *e, float *kept, int64_t n, float term, float scale) {
    for (int64_t i = 0; i < n; i++) {
        kept[i] = e[i] > 0 || e[i] != e[i] ? e[i] : 0.0f;
        ds[i] = scale * (kept[i] * ds[i] - __builtin_fabsf(e[i]) * term);
    }
}

// dy and out have the shape and the strides of out in the forward pass. e is what the forward pass left. dk and dv have the same
// strides.
void NAME(attention_backward)(
    const float *dy, const float *q, const float *k, const float *v, const float *out, const float *factor, const float *e,
    float *dq, float *dk, float *dv, float *scratch, int64_t b, int64_t h, int64_t n_query, int64_t n_key, int64_t head_dim,
    int64_t q_batch, int64_t q_head, int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row, int64_t dq_batch,
    int64_t dq_head, int64_t dq_row, int64_t dk_batch, int64_t dk_head, int64_t dk_row, double scale, double keep) {
    const head_scratch s = scratch_of(scratch, n_key, head_dim);
    const int64_t n_blocks = (n_query + QUERIES - 1) / QUERIES;
    for (int64_t head = 0; head < b * h; head++, factor += n_query) {
        const int64_t batch = head / h, at = batch * k_batch + head % h * k_head;
        const int64_t y = batch * n_query * h * head_dim + head % h * head_dim;
        const int64_t at_dq = batch * dq_batch + head % h * dq_head, at_dk = batch * dk_batch + head % h * dk_head;
        const matrix queries = {q + batch * q_batch + head % h * q_head, q_row, 1};
        pack_columns((matrix){v + at, 1, k_row}, head_dim, n_key, 0, s.along);
        pack_keys((matrix){k + at, k_row, 1}, n_key, head_dim, s.across);
        e += NAME(attention_exponentials)(n_query, n_key);  // to the end of this head
        const float *block_e = e;
        for (int64_t block = n_blocks - 1; block >= 0; block--) {  // the last block sees all keys, so it writes; others add
            const int64_t start = block * QUERIES, rows = smaller(n_query - start, QUERIES), seen = n_key - n_query + start + rows;
            const int64_t at_y = y + start * h * head_dim, add = block < n_blocks - 1;
            float term[QUERIES];
            block_e -= rows * seen;
            gradient_of_rows(dy + at_y, out + at_y, h * head_dim, factor + start, keep, rows, head_dim, s.g, term);
            multiply((matrix){s.g, head_dim, 1}, s.along, head_dim, 0, s.scores, seen, rows, seen, head_dim, 0, s.a, 0);
            for (int64_t r = 0; r < rows; r++)
                softmax_backward_of_row(s.scores + r * seen, block_e + r * seen, s.kept + r * seen, seen, term[r], scale);
            sum_over_keys(s.scores, s.across, dq + at_dq + start * dq_row, dq_row, rows, seen, n_key, head_dim, s.a);
            pack_columns(part(queries, start, 0), rows, head_dim, 0, s.packed);
            multiply((matrix){s.scores, 1, seen}, s.packed, rows, 0, dk + at_dk, dk_row, seen, head_dim, rows, add, s.a, 0);
            pack_columns((matrix){s.g, head_dim, 1}, rows, head_dim, 0, s.packed);
            multiply((matrix){s.kept, 1, seen}, s.packed, rows, 0, dv + at_dk, dk_row, seen, head_dim, rows, add, s.a, 0);
        }
    }
}
