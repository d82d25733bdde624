// A matrix product with operands rounded to bfloat16 and sums in float32, for processors with AVX512-BF16: such a processor
// multiplies and adds twice as many pairs of bfloat16 as of float32. The matrices in memory are float32.
//
// As in "Anatomy of High-Performance Matrix Multiplication" (Goto and van de Geijn, 2008): panels of a and of b are copied into the
// order in which the innermost loop reads them, and rounded there. That loop keeps a tile of ROWS x COLUMNS sums in registers.

#define ROWS 12
#define COLUMNS 32
#define K_BLOCK 512  // values along k in a panel: a panel of b stays in the first-level cache
#define M_BLOCK 120  // rows of a that are packed at once; they stay in the second-level cache

typedef uint32_t pair;  // two values that are neighbours along k, in bfloat16; the first one is in the lower half

static inline __m512i rounded(vec value) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)value)); }

// `panel` columns w of `depth` values along k, as pairs to[p, w]. The first `width` columns exist; the
// others are filled with zeros. Neighbouring columns are neighbours in memory, and values along k are `stride` apart.
static void pack_across(const float *from, int64_t stride, int64_t width, int64_t depth, int64_t panel, pair *to) {
    for (int64_t p = 0; p < depth; p += 2, from += 2 * stride, to += panel)
        for (int64_t w = 0; w < panel; w += LANES) {
            int64_t left = width > w ? width - w : 0;
            __m512i first = rounded(load_some(from + w, left, 0)), second = _mm512_setzero_si512();
            if (p + 1 < depth) second = rounded(load_some(from + stride + w, left, 0));
            store_some((float *)(to + w), panel - w, (vec)_mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        }
}

// The same for columns that are `stride` apart. Neighbouring values along k are neighbours in memory.
static void pack_along(const float *from, int64_t stride, int64_t width, int64_t depth, int64_t panel, pair *to) {
    for (int64_t w = 0; w < panel; w++, from += stride)
        for (int64_t p = 0; p < depth; p += 2 * LANES) {
            int64_t left = w < width ? depth - p : 0;
            vec lower = load_some(from + p, left, 0), upper = load_some(from + p + LANES, left > LANES ? left - LANES : 0, 0);
            pair pairs[LANES];
            _mm512_storeu_si512(pairs, (__m512i)_mm512_cvtne2ps_pbh((__m512)upper, (__m512)lower));
            pair *at = to + p / 2 * panel + w;
            const int64_t count = (depth - p + 1) / 2;
            if (count >= LANES)
                UNROLL for (int i = 0; i < LANES; i++) at[i * panel] = pairs[i];
            else
                for (int i = 0; i < count; i++) at[i * panel] = pairs[i];
        }
}

// out (rows, columns) = a @ b for one tile, with `steps` pairs along k; plus what is in out already if `add`, else plus the bias.
static inline void tile(
    const pair *a, const pair *b, int64_t steps, float *out, int64_t stride, int64_t rows, int64_t columns, int add,
    const float *bias) {
    __m512 sum[ROWS][2];
    vec bias0 = bias && !add ? load_some(bias, columns, 0) : splat(0);
    vec bias1 = bias && !add && columns > LANES ? load_some(bias + LANES, columns - LANES, 0) : splat(0);
    UNROLL for (int i = 0; i < ROWS; i++) sum[i][0] = (__m512)bias0, sum[i][1] = (__m512)bias1;
    for (int64_t p = 0; p < steps; p++, a += ROWS, b += COLUMNS) {
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + LANES);
        UNROLL for (int i = 0; i < ROWS; i++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32(a[i]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], b0, both);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], b1, both);
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++) {
        if (i >= rows) break;
        float *row = out + i * stride;
        store_some(row, columns, add ? load_some(row, columns, 0) + (vec)sum[i][0] : (vec)sum[i][0]);
        row += LANES;
        if (columns > LANES)
            store_some(row, columns - LANES, add ? load_some(row, columns - LANES, 0) + (vec)sum[i][1] : (vec)sum[i][1]);
    }
}

// out (m, n) = a (m, k) @ b (k, n) + bias (n,), or out += a @ b if `add`. Element (i, p) of a is at a[i * a_row + p * a_column], and
// one of the two strides is 1; b likewise. out is contiguous. scratch has room for product_scratch_bytes(n).
void NAME(product)(
    const float *a, const float *b, const float *bias, float *out, void *scratch, int64_t m, int64_t n, int64_t k, int64_t a_row,
    int64_t a_column, int64_t b_row, int64_t b_column, int64_t add) {
    const int64_t panels = (n + COLUMNS - 1) / COLUMNS;
    pair *packed_a = scratch, *packed_b = packed_a + M_BLOCK * (K_BLOCK / 2);
    for (int64_t p = 0; p < k || p == 0; p += K_BLOCK) {
        const int64_t depth = k - p < K_BLOCK ? k - p : K_BLOCK, steps = (depth + 1) / 2;
        for (int64_t j = 0; j < panels; j++) {
            const float *from = b + p * b_row + j * COLUMNS * b_column;
            pair *to = packed_b + j * steps * COLUMNS;
            if (b_column == 1)
                pack_across(from, b_row, n - j * COLUMNS, depth, COLUMNS, to);
            else
                pack_along(from, b_column, n - j * COLUMNS, depth, COLUMNS, to);
        }
        for (int64_t i = 0; i < m; i += M_BLOCK) {
            const int64_t rows = m - i < M_BLOCK ? m - i : M_BLOCK;
            for (int64_t r = 0; r < rows; r += ROWS) {
                const float *from = a + (i + r) * a_row + p * a_column;
                if (a_row == 1)
                    pack_across(from, a_column, rows - r, depth, ROWS, packed_a + r * steps);
                else
                    pack_along(from, a_row, rows - r, depth, ROWS, packed_a + r * steps);
            }
            for (int64_t j = 0; j < panels; j++)
                for (int64_t r = 0; r < rows; r += ROWS)
                    tile(
                        packed_a + r * steps, packed_b + j * steps * COLUMNS, steps, out + (i + r) * n + j * COLUMNS, n,
                        rows - r, n - j * COLUMNS, add || p > 0, bias ? bias + j * COLUMNS : bias);
        }
    }
}

// The bytes of scratch memory for a product with n columns.
int64_t NAME(product_scratch_bytes)(int64_t n) {
    return (M_BLOCK + (n + COLUMNS - 1) / COLUMNS * COLUMNS) * (K_BLOCK / 2) * (int64_t)sizeof(pair);
}
