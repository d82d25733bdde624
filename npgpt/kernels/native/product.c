// Matrix products in float32, by one thread. On processors with AVX512-BF16 there is a second version, which rounds the operands to
// bfloat16 and adds up in float32: such a processor multiplies and adds twice as many pairs of bfloat16 as of float32. The matrices
// in memory are float32.
//
// As in "Anatomy of High-Performance Matrix Multiplication" (Goto and van de Geijn, 2008): parts of a and b are copied into panels,
// in the order in which the innermost loop reads them, and rounded there. That loop keeps a tile of ROWS x COLUMNS sums in
// registers.
//
// A panel consists of words of 4 bytes: a word is a float, or if `pairs`, two bfloat16 that are neighbours along k. A step of the
// innermost loop takes one word of each row and of each column. `pairs` is a constant in every call, so the compiler makes two
// versions of each function.

#define ROWS (BYTES == 64 ? 12 : 6)
#define COLUMNS (2 * LANES)
#define STEPS 384    // at most, in a panel; the panels being read stay in the first- and second-level cache
#define M_BLOCK 120  // rows of a in panels at once

// A matrix whose element (i, j) is at at[i * row + j * column]. One of the two strides is 1.
typedef struct {
    const float *at;
    int64_t row, column;
} matrix;

static inline matrix part(matrix from, int64_t i, int64_t j) {
    return (matrix){from.at + i * from.row + j * from.column, from.row, from.column};
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#ifdef HAS_BFLOAT16
static inline __m512i rounded(vec value) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)value)); }

static inline vec pairs_of(vec first, vec second) {
    return (vec)_mm512_or_si512(rounded(first), _mm512_slli_epi32(rounded(second), 16));
}

static inline vec pairs_in_order(vec lower, vec upper) { return (vec)(__m512i)_mm512_cvtne2ps_pbh((__m512)upper, (__m512)lower); }

static inline vec add_products(vec sum, vec a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
}
#else  // never called
static inline vec pairs_of(vec first, vec second) { return first + second; }
static inline vec pairs_in_order(vec lower, vec upper) { return lower + upper; }
static inline vec add_products(vec sum, vec a, vec b) { return sum + a * b; }
#endif

// LANES words of values that are neighbours along k. n values are left.
static inline vec words_along(const float *from, int64_t n, const int pairs) {
    if (!pairs) return load_some(from, n, 0);
    return pairs_in_order(load_some(from, n, 0), n > LANES ? load_some(from + LANES, n - LANES, 0) : splat(0));
}

// A matrix of LANES x LANES words -> its transpose, in place.
static inline void transpose(vec *words) {
#if BYTES == 64
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    UNROLL for (int size = LANES / 2; size; size /= 2) {  // in each square of 2 * size, exchange the two quarters off the diagonal
        const __mmask16 right = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(size));
        const __m512i upper = _mm512_mask_add_epi32(lane, right, lane, _mm512_set1_epi32(LANES - size));
        const __m512i lower = _mm512_add_epi32(upper, _mm512_set1_epi32(size));
        UNROLL for (int i = 0; i < LANES; i++) {
            if (i & size) continue;
            __m512 a = (__m512)words[i], b = (__m512)words[i + size];
            words[i] = (vec)_mm512_permutex2var_ps(a, upper, b);
            words[i + size] = (vec)_mm512_permutex2var_ps(a, lower, b);
        }
    }
#else
    float from[LANES][LANES], to[LANES][LANES];
    memcpy(from, words, sizeof from);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) to[i][j] = from[j][i];
    memcpy(words, to, sizeof to);
#endif
}

// `width` rows or columns whose neighbours are neighbours in memory -> a panel to[step, w]. n of them exist; others become zeros.
// `depth` values along k are `stride` apart.
static inline void pack_across(
    const float *from, int64_t stride, int64_t n, int64_t depth, int64_t width, const int pairs, float *to) {
    const int values = pairs ? 2 : 1;
    for (int64_t p = 0; p < depth; p += values, from += values * stride, to += width)
        for (int64_t w = 0; w < width; w += LANES) {
            int64_t left = n > w ? n - w : 0;
            vec words = load_some(from + w, left, 0);
            if (pairs) words = pairs_of(words, p + 1 < depth ? load_some(from + stride + w, left, 0) : splat(0));
            store_some(to + w, width - w, words);
        }
}

// COLUMNS that are `stride` apart -> a panel to[step, column]. n of them exist. Neighbours along k are neighbours in memory.
static inline void pack_along(const float *from, int64_t stride, int64_t n, int64_t depth, const int pairs, float *to) {
    const int values = pairs ? 2 : 1;
    for (int64_t w = 0; w < COLUMNS; w += LANES)
        for (int64_t p = 0; p < depth; p += LANES * values) {
            vec words[LANES];
            UNROLL for (int i = 0; i < LANES; i++)
                words[i] = w + i < n ? words_along(from + (w + i) * stride + p, depth - p, pairs) : splat(0);
            transpose(words);
            const int64_t steps = smaller((depth - p + values - 1) / values, LANES);
            float *at = to + p / values * COLUMNS + w;
            if (steps == LANES)
                UNROLL for (int i = 0; i < LANES; i++) store(at + i * COLUMNS, words[i]);
            else
                for (int i = 0; i < steps; i++) store(at + i * COLUMNS, words[i]);
        }
}

// ROWS that are `stride` apart -> a panel to[row * STEPS + step]. n of them exist. Neighbours along k are neighbours in memory.
static inline void pack_rows(const float *from, int64_t stride, int64_t n, int64_t depth, const int pairs, float *to) {
    const int values = pairs ? 2 : 1;
    for (int64_t i = 0; i < ROWS; i++, from += stride, to += STEPS)
        for (int64_t p = 0; p < depth; p += LANES * values)
            store(to + p / values, i < n ? words_along(from + p, depth - p, pairs) : splat(0));
}

// b (depth, n) -> panels of COLUMNS columns, one after the other.
static inline void pack_columns(matrix b, int64_t depth, int64_t n, const int pairs, float *to) {
    const int64_t steps = pairs ? (depth + 1) / 2 : depth;
    for (int64_t j = 0; j < n; j += COLUMNS) {
        if (b.column == 1)
            pack_across(part(b, 0, j).at, b.row, n - j, depth, COLUMNS, pairs, to + j * steps);
        else
            pack_along(part(b, 0, j).at, b.column, n - j, depth, pairs, to + j * steps);
    }
}

// What a tile is computed from and where it goes: out (n_rows, n_columns) = a @ b for two panels, plus what is in out already if
// `add`, else plus the bias.
typedef struct {
    const float *a, *b, *bias;
    float *out;
    int64_t steps, out_row, n_rows, n_columns, add;
} tile;

// `rows` and `vectors` are the size of the sums in registers. If `along`, the panel of a is that of pack_rows.
static inline __attribute__((always_inline)) void compute(
    const tile *t, const int rows, const int vectors, const int along, const int pairs) {
    const float *a = t->a, *b = t->b;
    vec sum[ROWS][2];
    UNROLL for (int j = 0; j < vectors; j++) {
        vec start = t->bias && !t->add ? load_some(t->bias + j * LANES, t->n_columns - j * LANES, 0) : splat(0);
        UNROLL for (int i = 0; i < rows; i++) {
            sum[i][j] = start;
            __builtin_prefetch(t->out + (i < t->n_rows ? i : 0) * t->out_row + j * LANES, 1);
        }
    }
    for (int64_t step = 0; step < t->steps; step++, a += along ? 1 : ROWS, b += COLUMNS) {
        vec columns[2];
        UNROLL for (int j = 0; j < vectors; j++) columns[j] = load(b + j * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            vec row = splat(a[along ? i * STEPS : i]);
            UNROLL for (int j = 0; j < vectors; j++)
                sum[i][j] = pairs ? add_products(sum[i][j], columns[j], row) : sum[i][j] + columns[j] * row;
        }
    }
    const int whole = t->n_columns >= vectors * LANES;
    UNROLL for (int i = 0; i < rows; i++) {
        if (i >= t->n_rows) break;
        UNROLL for (int j = 0; j < vectors; j++) {
            float *at = t->out + i * t->out_row + j * LANES;
            const int64_t left = whole ? LANES : t->n_columns - j * LANES;
            store_some(at, left, t->add ? load_some(at, left, 0) + sum[i][j] : sum[i][j]);
        }
    }
}

// A function for each kind of tile. Inlined into one function, they would compete for registers. `thirds` of ROWS are in registers.
#define TILE_FUNCTION(thirds, vectors, along, pairs)                                                   \
    static __attribute__((noinline)) void tile_##thirds##_##vectors##_##along##_##pairs(const tile *t) { \
        compute(t, ROWS * thirds / 3, vectors, along, pairs);                                           \
    }
#define TILE_FUNCTIONS(along, pairs)                                                                                     \
    TILE_FUNCTION(1, 1, along, pairs)                                                                                    \
    TILE_FUNCTION(2, 1, along, pairs)                                                                                    \
    TILE_FUNCTION(3, 1, along, pairs)                                                                                    \
    TILE_FUNCTION(1, 2, along, pairs)                                                                                    \
    TILE_FUNCTION(2, 2, along, pairs)                                                                                    \
    TILE_FUNCTION(3, 2, along, pairs)                                                                                    \
    static void (*const tiles_##along##_##pairs[2][3])(const tile *) = {                                                 \
        {tile_1_1_##along##_##pairs, tile_2_1_##along##_##pairs, tile_3_1_##along##_##pairs},                            \
        {tile_1_2_##along##_##pairs, tile_2_2_##along##_##pairs, tile_3_2_##along##_##pairs},                            \
    };
TILE_FUNCTIONS(0, 0)
TILE_FUNCTIONS(1, 0)
#ifdef HAS_BFLOAT16
TILE_FUNCTIONS(0, 1)
TILE_FUNCTIONS(1, 1)
#define TILES(along, pairs) (pairs ? along ? tiles_1_1 : tiles_0_1 : along ? tiles_1_0 : tiles_0_0)
#else
#define TILES(along, pairs) (along ? tiles_1_0 : tiles_0_0)
#endif

// out (m, n) = a (m, depth) @ b + bias (n,), or out += a @ b if `add`; b is in panels of b_steps steps each. Neighbours in a row of
// out are neighbours in memory, and rows are out_row apart. packed_a has room for M_BLOCK * STEPS words.
static inline void multiply(
    matrix a, const float *b, int64_t b_steps, const float *bias, float *out, int64_t out_row, int64_t m, int64_t n, int64_t depth,
    int64_t add, float *packed_a, const int pairs) {
    const int along = a.column == 1;
    void (*const *const kinds)(const tile *) = TILES(along, pairs)[0];
    for (int64_t i = 0; i < m; i += M_BLOCK) {
        const int64_t rows = smaller(m - i, M_BLOCK);
        for (int64_t r = 0; r < rows; r += ROWS) {
            if (along)
                pack_rows(part(a, i + r, 0).at, a.row, rows - r, depth, pairs, packed_a + r * STEPS);
            else
                pack_across(part(a, i + r, 0).at, a.column, rows - r, depth, ROWS, pairs, packed_a + r * STEPS);
        }
        for (int64_t j = 0; j < n; j += COLUMNS)
            for (int64_t r = 0; r < rows; r += ROWS) {
                const tile t = {
                    packed_a + r * STEPS, b + j * b_steps, bias ? bias + j : bias, out + (i + r) * out_row + j,
                    pairs ? (depth + 1) / 2 : depth, out_row, rows - r, n - j, add,
                };
                const int thirds = rows - r > ROWS * 2 / 3 ? 3 : rows - r > ROWS / 3 ? 2 : 1;
                kinds[(n - j > LANES) * 3 + thirds - 1](&t);
            }
    }
}

// out (m, n) = a (m, k) @ b (k, n) + bias (n,), or out += a @ b if `add`. out is contiguous.
static inline void product_of(
    matrix a, matrix b, const float *bias, float *out, float *scratch, int64_t m, int64_t n, int64_t k, int64_t add,
    const int pairs) {
    float *packed_a = scratch, *packed_b = packed_a + M_BLOCK * STEPS;
    const int64_t values = pairs ? 2 * STEPS : STEPS, blocks = k > values ? (k + values - 1) / values : 1;
    const int64_t in_a_block = rounded_up((k + blocks - 1) / blocks, 2);  // blocks of nearly equal size
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t p = block * in_a_block, depth = smaller(k - p, in_a_block);
        pack_columns(part(b, p, 0), depth, n, pairs, packed_b);
        const int64_t steps = pairs ? (depth + 1) / 2 : depth;
        multiply(part(a, 0, p), packed_b, steps, bias, out, n, m, n, depth, add || block, packed_a, pairs);
    }
}

// The same with the strides of both matrices. scratch has room for product_scratch(n).
void NAME(product)(
    const float *a, const float *b, const float *bias, float *out, float *scratch, int64_t m, int64_t n, int64_t k, int64_t a_row,
    int64_t a_column, int64_t b_row, int64_t b_column, int64_t add) {
    product_of((matrix){a, a_row, a_column}, (matrix){b, b_row, b_column}, bias, out, scratch, m, n, k, add, 0);
}

#ifdef HAS_BFLOAT16
// The same with operands rounded to bfloat16.
void NAME(bfloat16_product)(
    const float *a, const float *b, const float *bias, float *out, float *scratch, int64_t m, int64_t n, int64_t k, int64_t a_row,
    int64_t a_column, int64_t b_row, int64_t b_column, int64_t add) {
    product_of((matrix){a, a_row, a_column}, (matrix){b, b_row, b_column}, bias, out, scratch, m, n, k, add, 1);
}
#endif

// The bytes of scratch memory for a product with n columns.
int64_t NAME(product_scratch)(int64_t n) { return (M_BLOCK + rounded_up(n, COLUMNS)) * STEPS * (int64_t)sizeof(float); }
