// One more token of each sequence: products of a few rows, attention over the cache, and the blocks of a transformer. The
// time of such a product is the time to read the weights, so they are read once, in the order in which they lie in memory.

#define VECTORS (BYTES == 64 ? 4 : 2)  // vectors of one row of y in registers
#define WIDTH (VECTORS * LANES)        // columns of y computed at once
#define AT_ONCE 6                      // rows of y computed at once
#define DEPTH 32                       // rows of w used at once; WIDTH columns of them stay in the first-level cache
#define TILE 2048                      // columns of a single row; they stay in the first-level cache

// Brings the numbers at `from` into the second-level cache. The processor itself sees no pattern in rows that are read in pieces.
// `from` may be past the end of an array.
#define FETCH(from) __builtin_prefetch(from, 0, 2)

// y (columns,) += x (n,) @ w (n, columns). The rows of w are m apart.
static inline void one_row_product(const float *x, const float *w, float *y, int64_t n, int64_t m, int64_t columns) {
    for (int64_t tile = 0; tile < columns; tile += TILE) {
        const int64_t end = columns - tile < TILE ? columns : tile + TILE;
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)  // eight rows of w at once, so that y is read and written less often
            for (int64_t j = tile; j < end; j += LANES) {
                const float *from = w + i * m + j;
                vec sum = load_some(y + j, end - j, 0);
                UNROLL for (int r = 0; r < 8; r++, from += m) {
                    sum += x[i + r] * load_some(from, end - j, 0);
                    FETCH(from + 16 * m);
                }
                store_some(y + j, end - j, sum);
            }
        for (; i < n; i++)
            for (int64_t j = tile; j < end; j += LANES)
                store_some(y + j, end - j, load_some(y + j, end - j, 0) + x[i] * load_some(w + i * m + j, end - j, 0));
    }
}

// WIDTH columns of `rows` <= AT_ONCE rows of y += x @ w, for `depth` rows of w. The rows of x, w and y are n, stride and m apart.
//
// With `fetch`, the rows of w after these are fetched. With `fetch` and `copy`, these columns of w are also written to copy, one row
// after the other.
static inline __attribute__((always_inline)) void block_product(
    const float *x, const float *w, float *y, float *copy, int64_t n, int64_t stride, int64_t m, int64_t depth, const int rows,
    const int fetch) {
    vec sum[AT_ONCE][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = load(y + r * m + v * LANES);
    for (int64_t i = 0; i < depth; i++, w += stride) {
        vec part[VECTORS];
        for (int v = 0; v < VECTORS; v++) part[v] = load(w + v * LANES);
        if (fetch)
            for (int v = 0; v < VECTORS; v++) FETCH(w + DEPTH * stride + v * LANES);
        if (fetch && copy)
            for (int v = 0; v < VECTORS; v++) store(copy + i * WIDTH + v * LANES, part[v]);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) sum[r][v] += x[r * n + i] * part[v];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) store(y + r * m + v * LANES, sum[r][v]);
}

// WIDTH columns of two or more rows of y += x @ w, for depth <= DEPTH rows of w. The first AT_ONCE rows read w and copy it; the others
// read the copy.
static void strip_of_product(const float *x, const float *w, float *y, int64_t rows, int64_t n, int64_t m, int64_t depth) {
    float copy[DEPTH * WIDTH] __attribute__((aligned(64)));
    switch (rows) {  // a constant number of rows, so that sums are in registers
        case 2: block_product(x, w, y, 0, n, m, m, depth, 2, 1); return;
        case 3: block_product(x, w, y, 0, n, m, m, depth, 3, 1); return;
        case 4: block_product(x, w, y, 0, n, m, m, depth, 4, 1); return;
        case 5: block_product(x, w, y, 0, n, m, m, depth, 5, 1); return;
        case 6: block_product(x, w, y, 0, n, m, m, depth, 6, 1); return;
        default: block_product(x, w, y, copy, n, m, m, depth, 6, 1);
    }
    for (int64_t r = AT_ONCE; r < rows; r += AT_ONCE) {
        x += AT_ONCE * n, y += AT_ONCE * m;
        switch (rows - r < AT_ONCE ? rows - r : AT_ONCE) {
            case 1: block_product(x, copy, y, 0, n, WIDTH, m, depth, 1, 0); break;
            case 2: block_product(x, copy, y, 0, n, WIDTH, m, depth, 2, 0); break;
            case 3: block_product(x, copy, y, 0, n, WIDTH, m, depth, 3, 0); break;
            case 4: block_product(x, copy, y, 0, n, WIDTH, m, depth, 4, 0); break;
            case 5: block_product(x, copy, y, 0, n, WIDTH, m, depth, 5, 0); break;
            default: block_product(x, copy, y, 0, n, WIDTH, m, depth, 6, 0);
        }
    }
}

// The columns from `first` to `end` of: y (rows, m) = x (rows, n) @ w (n, m) + bias (m,), or y += that if `add`. bias may be NULL.
static void columns_of_product(
    const float *x, const float *w, const float *bias, float *y, int64_t rows, int64_t n, int64_t m, int64_t add, int64_t first,
    int64_t end) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = first; j < end; j++) y[r * m + j] = (add ? y[r * m + j] : 0.0f) + (bias ? bias[j] : 0.0f);
    const int64_t whole = rows < 2 ? first : first + (end - first) / WIDTH * WIDTH;
    for (int64_t i = 0; i < n; i += DEPTH)
        for (int64_t j = first; j < whole; j += WIDTH)
            strip_of_product(x + i, w + i * m + j, y + j, rows, n, m, n - i < DEPTH ? n - i : DEPTH);
    for (int64_t r = 0; r < rows; r++) one_row_product(x + r * n, w + whole, y + r * m + whole, n, m, end - whole);
}

// The same for all columns.
void NAME(few_rows_product)(
    const float *x, const float *w, const float *bias, float *y, int64_t rows, int64_t n, int64_t m, int64_t add) {
    columns_of_product(x, w, bias, y, rows, n, m, add, 0, m);
}

// y (head_dim) = attention of one query over `tokens` keys and values. absent is null, or -inf where there is no key. scores has
// room for `tokens`.
static void attend(
    const float *query, const float *key, const float *value, const float *absent, float *y, float *scores, int64_t tokens,
    int64_t head_dim, float scale) {
    for (int64_t t = 0; t < tokens; t++, key += head_dim) {
        vec dot = splat(0);
        for (int64_t i = 0; i < head_dim; i += LANES)
            dot += load_some(query + i, head_dim - i, 0) * load_some(key + i, head_dim - i, 0);
        scores[t] = scale * sum_of(dot) + (absent ? absent[t] : 0.0f);
    }
    float factor = 1 / exponentials_of_row(scores, scores, tokens, 1, largest_of_row(scores, tokens));
    int64_t i = 0;
    for (; i + WIDTH <= head_dim; i += WIDTH) {
        vec sum[VECTORS];
        for (int v = 0; v < VECTORS; v++) sum[v] = splat(0);
        for (int64_t t = 0; t < tokens; t++)
            for (int v = 0; v < VECTORS; v++) sum[v] += scores[t] * load(value + t * head_dim + i + v * LANES);
        for (int v = 0; v < VECTORS; v++) store(y + i + v * LANES, sum[v] * factor);
    }
    for (; i < head_dim; i += LANES) {  // what is left of a head
        vec sum = splat(0);
        for (int64_t t = 0; t < tokens; t++) sum += scores[t] * load_some(value + t * head_dim + i, head_dim - i, 0);
        store_some(y + i, head_dim - i, sum * factor);
    }
}

// y (batch, heads, head_dim) = attention of one query of each sequence over `tokens` keys and values of each head.
//
// The heads of a query follow each other, and so do the keys of a head. The strides say where the next sequence and the next head
// are. absent (batch, tokens) is null, or -inf where a sequence has no key. scores has room for `tokens`.
void NAME(decode_attention)(
    const float *q, const float *k, const float *v, const float *absent, float *y, float *scores, int64_t batch, int64_t heads,
    int64_t tokens, int64_t head_dim, int64_t q_stride, int64_t kv_stride, int64_t kv_head_stride, double scale) {
    for (int64_t b = 0; b < batch; b++)
        for (int64_t h = 0; h < heads; h++, y += head_dim) {
            const int64_t at = b * kv_stride + h * kv_head_stride;
            attend(
                q + b * q_stride + h * head_dim, k + at, v + at, absent ? absent + b * tokens : 0, y, scores, tokens, head_dim, scale);
        }
}

// Turn pairs of x (n) by angles, whose cosines and sines take turns in `rotation`.
static void rotate(float *x, const float *rotation, int64_t n) {
    for (int64_t i = 0; i < n; i += 2) {
        float first = x[i], second = x[i + 1], cosine = rotation[i], sine = rotation[i + 1];
        x[i] = first * cosine - second * sine;
        x[i + 1] = first * sine + second * cosine;
    }
}

// Threads that compute one call together.
typedef struct {
    int64_t arrived, round, cancelled;
} meeting;

// Returns when all `members` have called it. Returns 0 if the call is cancelled. A thread that waits long lets others have its core.
static int meet(meeting *m, int64_t members) {
    if (members == 1) return 1;
    const int64_t round = __atomic_load_n(&m->round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&m->arrived, 1, __ATOMIC_ACQ_REL) == members) {
        __atomic_store_n(&m->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&m->round, round + 1, __ATOMIC_RELEASE);
        return 1;
    }
    for (int i = 0; __atomic_load_n(&m->round, __ATOMIC_ACQUIRE) == round; i++) {
        if (__atomic_load_n(&m->cancelled, __ATOMIC_ACQUIRE)) return 0;
        if (i > 4000) sched_yield();
    }
    return 1;
}

// The weight and the bias of each layer of a block. A bias may be NULL.
struct block_weights {
    const float *ln_1, *ln_1_bias, *qkv, *qkv_bias, *out, *out_bias, *ln_2, *ln_2_bias, *fc, *fc_bias, *proj, *proj_bias;
};

// All blocks of a transformer for one more token of each sequence: x (batch, c), in place.
//
// cache (layers, 2, most, heads, room, head_dim) has keys and values, of which the first `batch` of `most` sequences are used.
// lengths (batch,) says how many tokens came before: the key of this one takes the place of the oldest one if there is no room left.
// rotations (batch, head_dim) is NULL without rotary positions.
//
// `members` threads make this call at the same time, with the same arguments but `member`, which counts from 0, and `own`. Each
// computes some columns of each product and some heads. Which thread computes a number does not change it. `shared` has room for
// batch * (3 c + c + d_ff), `own` for batch * (c + 2) + room. at_meeting is three zeros; its last number cancels the call if it is 1.
void NAME(decode_blocks)(
    float *x, const struct block_weights *weights, float *cache, const int64_t *lengths, const float *rotations, float *shared,
    float *own, void *at_meeting, int64_t layers, int64_t batch, int64_t c, int64_t heads, int64_t d_ff, int64_t room, int64_t most,
    int64_t is_gelu, double eps, int64_t member, int64_t members) {
    const int64_t head_dim = c / heads;
    float *qkv = shared, *attended = qkv + batch * 3 * c, *hidden = attended + batch * c;
    float *normed = own, *moments = normed + batch * c, *scores = moments + 2 * batch;
#define BOUND(columns, i) ((i) == members ? (columns) : (columns) * (i) / members / WIDTH * WIDTH)
#define MY_COLUMNS(columns) BOUND(columns, member), BOUND(columns, member + 1)
#define MEET                              \
    if (!meet(at_meeting, members)) return
    for (const struct block_weights *w = weights; w < weights + layers; w++, cache += 2 * most * room * c) {
        NAME(layer_norm_forward)(x, w->ln_1, w->ln_1_bias, normed, moments, moments + batch, batch, c, eps);
        columns_of_product(normed, w->qkv, w->qkv_bias, qkv, batch, c, 3 * c, 0, MY_COLUMNS(3 * c));
        MEET;
        for (int64_t i = batch * heads * member / members; i < batch * heads * (member + 1) / members; i++) {
            const int64_t b = i / heads, newest = lengths[b] % room * head_dim;
            float *k = cache + i * room * head_dim, *v = k + most * room * c;
            float *query = qkv + b * 3 * c + i % heads * head_dim, *key = query + c, *value = key + c;
            if (rotations) {
                rotate(query, rotations + b * head_dim, head_dim);
                rotate(key, rotations + b * head_dim, head_dim);
            }
            memcpy(k + newest, key, head_dim * sizeof(float));
            memcpy(v + newest, value, head_dim * sizeof(float));
            const int64_t tokens = lengths[b] < room ? lengths[b] + 1 : room;
            attend(query, k, v, 0, attended + i * head_dim, scores, tokens, head_dim, 1 / __builtin_sqrtf(head_dim));
        }
        MEET;
        columns_of_product(attended, w->out, w->out_bias, x, batch, c, c, 1, MY_COLUMNS(c));
        MEET;
        NAME(layer_norm_forward)(x, w->ln_2, w->ln_2_bias, normed, moments, moments + batch, batch, c, eps);
        const int64_t first = BOUND(d_ff, member), end = BOUND(d_ff, member + 1);
        columns_of_product(normed, w->fc, w->fc_bias, hidden, batch, c, d_ff, 0, first, end);
        for (int64_t b = 0; b < batch; b++) {
            float *row = hidden + b * d_ff;
            if (is_gelu)
                NAME(gelu_forward)(row + first, row + first, end - first);
            else
                for (int64_t i = first; i < end; i++) row[i] = row[i] < 0 ? 0 : row[i];
        }
        MEET;
        columns_of_product(hidden, w->proj, w->proj_bias, x, batch, d_ff, c, 1, MY_COLUMNS(c));
        MEET;
    }
}
