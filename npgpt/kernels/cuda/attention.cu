// Causal attention that never writes its scores to memory, forward and backward. The formulas are those of causal_attention in
// reference.py; the order of the computation is that of "FlashAttention-2" (Dao, 2023). Dropout acts on the probabilities.
//
// A block computes 64 rows of a result, 16 in each warp, for one head of one sequence. It goes through the other operands in
// tiles of 64 rows. On the way back, probabilities are computed again from the scores and from the logarithm of their sum.
//
// q, k, v and their gradients are (batch, n, heads, HEAD_DIM), with `stride` elements from one of the n rows to the next; the
// heads of a row lie side by side. out and dout are contiguous. The n_query queries are the last of the n_key positions.
// Heads of sequences are counted together, and arrays with a number for each query are (batch * heads, n_query).
//
// This file follows common.cu, tensor_cores.cu and tiles.cu.

// On the way back, a block computes 1 / PARTS of the columns, so that its sums fit into registers. Each part computes the scores.
const int PARTS = D > 64 ? 2 : 1;
const int COLUMNS = D / PARTS;

// How many blocks a multiprocessor should hold at once. The compiler gives each thread fewer registers for it; with more blocks than
// these, some would not fit.
const int BLOCKS = D > 64 || sizeof(T) > 2 ? 2 : 4;
const int BLOCKS_OF_KEYS = BLOCKS < 3 ? BLOCKS : 3;

// ---------------------------------------------------------------- what the kernels share

// The first of the 16 rows of a tile that belong to this warp. After the shuffle the compiler knows that all threads of the
// warp have the same number, and so take the same branches.
__device__ inline int row_of_this_warp() { return __shfl_sync(0xffffffffu, (int)threadIdx.x / WARP, 0) * 16; }

// Which part of which result this block computes.
struct Place {
    int head, tile, part;  // a head of a sequence; a tile of its rows; a part of the columns
    int tiles;

    // Blocks with the same number of a tile follow each other.
    __device__ Place(int rows, int parts) {
        tiles = (rows + ROWS - 1) / ROWS;
        int heads = gridDim.x / (tiles * parts);
        head = blockIdx.x % heads;
        part = blockIdx.x / heads % parts;
        tile = blockIdx.x / (heads * parts);
    }

    // Where this head begins in an operand of n rows.
    __device__ long long start(int n, int stride, int heads_of_a_row) const {
        return (long long)(head / heads_of_a_row) * n * stride + head % heads_of_a_row * HEAD_DIM;
    }
};

// Exponentials and logarithms: of base 2 in bfloat16, where the hardware's approximation is enough, and else of base e. A score times
// `unit` is an exponent for `power`, and log_total is a logarithm of that base.
const A LOG_OF_BASE = sizeof(T) == 2 ? (A)0.6931471805599453 : (A)1;

__device__ inline A power(A x) { return sizeof(T) == 2 ? fast_exp2(x) : exp(x); }

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }

// The sum, or the maximum, over the four threads that share a row of a Sum.
__device__ inline A sum_of_four(A value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

__device__ inline A max_of_four(A value) {
    for (int distance = 1; distance < 4; distance *= 2) {
        A other = __shfl_xor_sync(0xffffffffu, value, distance);
        value = other > value ? other : value;
    }
    return value;
}

// The dropout mask of 16 queries and 16 keys, from `query` (a row of all scores) and `first_key` on. Each thread holds 8 bits:
// those of query lane % 16, and of the first 8 keys or the others.
struct Mask {
    unsigned mine;

    __device__ Mask(const unsigned long long* key, long long use, unsigned threshold, long long query, int first_key) {
        mine = 0xffu;
        if (!key) return;
        mine = 0;
        Draws draws(key, use, query + lane() % 16, first_key / (int)GROUP + lane() / 16);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) mine |= (unsigned)((unsigned)draws[j] >= threshold) << j;
    }

    // The 8 bits for a query, counted from the first, and for the first 8 keys (half 0) or the others.
    __device__ unsigned of(int query, int half) const { return __shfl_sync(0xffffffffu, mine, query + 16 * half); }
};

// ---------------------------------------------------------------- forward
//
// For each query: `top` is the largest score so far, `total` the sum of exp(score - top), `sums` the sum of exp(score - top) v.
// When a larger score comes, they are multiplied by exp(top - new top). Scores have no scale; the exponentials apply it.
//
// Queries past the end are zeros in a tile, and see zeros past the last key. Nothing of them is stored, and on the way back, what they
// add to keys and values is 0.

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_forward(
    const T* q, const T* k, const T* v, T* out, A* log_total, long long heads, long long n_query, long long n_key,
    long long q_stride, long long k_stride, long long v_stride, double scale, const unsigned long long* key,
    long long use, long long threshold, double kept_scale) {
    __shared__ Tile tiles[2 * BUFFERS];
    Place place(n_query, 1);
    const A unit = (A)(scale / LOG_OF_BASE);
    int first = (place.tiles - 1 - place.tile) * ROWS;  // the last queries, which see most keys, come first
    int row = row_of_this_warp();
    // This thread has the queries `query` and query + 8. Of 8 columns, it has `column` and column + 1.
    int query = first + row + lane() / 4, column = lane() % 4 * 2;
    int past = n_key - n_query, last_seen = past + first + row + 15;
    int end = past + first + ROWS < n_key ? past + first + ROWS : n_key;  // no query of this block sees more keys
    q += place.start(n_query, q_stride, heads);
    k += place.start(n_key, k_stride, heads);
    v += place.start(n_key, v_stride, heads);

    load_tile(tiles[0], q, q_stride, first, n_query);
    end_batch();
    wait_for_batches<0>();
    __syncthreads();
    Left queries[D / 16];
    read_rows(queries, tiles[0], row);
    __syncthreads();

    Sum sums[D / 8] = {};
    A top[2] = {minus_infinity(), minus_infinity()}, total[2] = {0, 0};
    for (int start = 0, buffer = 0; start < end; start += ROWS, buffer = (buffer + 2) % (2 * BUFFERS)) {
        get_tiles(tiles, buffer, start == 0, k, k_stride, v, v_stride, start, end, n_key);
        __syncthreads();
        const Tile &keys = tiles[buffer], &values = tiles[buffer + 1];

        Sum scores[ROWS / 8] = {};
        #pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
            if (start + 8 * n <= last_seen) multiply_rows(scores[n], queries, keys, 8 * n);
        if (past + first + row < start + ROWS - 1) {  // some query does not see all keys
            #pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    bool is_future = start + 8 * n + column + j % 2 > past + query + j / 2 * 8;
                    scores[n].at[j] = is_future ? minus_infinity() : scores[n].at[j];
                }
        }
        A new_top[2] = {top[0], top[1]}, subtracted[2];
        #pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
            #pragma unroll
            for (int j = 0; j < 4; j++) new_top[j / 2] = fmaxf(new_top[j / 2], scores[n].at[j]);
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            new_top[i] = max_of_four(new_top[i]);
            subtracted[i] = new_top[i] == minus_infinity() ? 0 : new_top[i];  // so that exp(-inf) is 0, and not NaN
            A factor = power(unit * (top[i] - subtracted[i]));
            total[i] *= factor;
            #pragma unroll
            for (int n = 0; n < D / 8; n++) {
                sums[n].at[2 * i] *= factor;
                sums[n].at[2 * i + 1] *= factor;
            }
            top[i] = new_top[i];
        }
        #pragma unroll
        for (int c = 0; c < ROWS / 16; c++) {  // 16 keys
            if (start + 16 * c > last_seen) continue;
            Mask mask(key, use, threshold, place.head * n_query + first + row, start + 16 * c);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const unsigned kept[2] = {mask.of(lane() / 4, half) >> column, mask.of(lane() / 4 + 8, half) >> column};
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    A& p = scores[2 * c + half].at[j];
                    p = power(unit * p - unit * subtracted[j / 2]);
                    total[j / 2] += p;
                    p = kept[j / 2] & (1 << j % 2) ? p : 0;
                }
            }
            Left p(scores[2 * c], scores[2 * c + 1]);
            multiply_columns<D / 8>(sums, p, values, 16 * c, 0);
        }
        __syncthreads();
    }

    A factors[2];
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i] = sum_of_four(total[i]);
        // A total is 0 if all scores are -inf. Then the probabilities are 0, here and on the way back. A total of NaN stays NaN.
        bool sees_something = total[i] > 0;
        factors[i] = sees_something ? (A)kept_scale / total[i] : total[i];
        if (lane() % 4 == 0 && query + 8 * i < n_query)
            log_total[place.head * n_query + query + 8 * i] =
                sees_something ? unit * top[i] + log(total[i]) / LOG_OF_BASE : total[i] - minus_infinity();
    }
    write_rows<D / 8>(tiles[0], 0, sums, factors);
    __syncthreads();
    int row_of_heads = heads * HEAD_DIM;
    store_tile(out + place.start(n_query, row_of_heads, heads), row_of_heads, first, n_query, tiles[0], 0, D);
}

// ---------------------------------------------------------------- backward
//
// With p = exp(score - log_total) and dp = dropout(dout @ v^T), dscores = p (dp - row_term). The row term sum_j dp_j p_j of the
// softmax rule equals the sum of dout times out, over the columns of a row.

// dq = scale dscores @ k. Also writes the row terms, which attention_backward_keys reads.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_backward_queries(
    const T* q, const T* k, const T* v, const T* out, const T* dout, const A* log_total, A* row_terms, T* dq, long long heads,
    long long n_query, long long n_key, long long q_stride, long long k_stride, long long v_stride, long long dq_stride,
    double scale, const unsigned long long* key, long long use, long long threshold, double kept_scale) {
    __shared__ Tile tiles[2 * BUFFERS];
    Place place(n_query, PARTS);
    const A unit = (A)(scale / LOG_OF_BASE), keeping = (A)kept_scale;
    int first = (place.tiles - 1 - place.tile) * ROWS, row = row_of_this_warp();
    int query = first + row + lane() / 4, column = lane() % 4 * 2;
    int past = n_key - n_query, last_seen = past + first + row + 15, row_of_heads = heads * HEAD_DIM;
    int end = past + first + ROWS < n_key ? past + first + ROWS : n_key;
    k += place.start(n_key, k_stride, heads);
    v += place.start(n_key, v_stride, heads);

    // The tiles, and `queries`, first hold the results and their gradients, for the row terms. Then they get the queries.
    load_tile(tiles[0], out + place.start(n_query, row_of_heads, heads), row_of_heads, first, n_query);
    load_tile(tiles[1], dout + place.start(n_query, row_of_heads, heads), row_of_heads, first, n_query);
    end_batch();
    wait_for_batches<0>();
    __syncthreads();
    Left queries[D / 16], gradients[D / 16];
    A row_term[2] = {0, 0}, log_sum[2];
    read_rows(queries, tiles[0], row);
    read_rows(gradients, tiles[1], row);
    #pragma unroll
    for (int i = 0; i < D / 16; i++)
        #pragma unroll
        for (int j = 0; j < 4; j++)
            row_term[j % 2] += queries[i].at[j].first() * gradients[i].at[j].first() +
                               queries[i].at[j].second() * gradients[i].at[j].second();
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        row_term[i] = sum_of_four(row_term[i]);
        bool is_there = query + 8 * i < n_query;
        long long at = place.head * n_query + query + 8 * i;
        log_sum[i] = is_there ? log_total[at] : 0;
        if (is_there && lane() % 4 == 0 && place.part == 0) row_terms[at] = row_term[i];
    }
    __syncthreads();
    load_tile(tiles[0], q + place.start(n_query, q_stride, heads), q_stride, first, n_query);
    end_batch();
    wait_for_batches<0>();
    __syncthreads();
    read_rows(queries, tiles[0], row);
    __syncthreads();

    Sum sums[COLUMNS / 8] = {};
    for (int start = 0, buffer = 0; start < end; start += ROWS, buffer = (buffer + 2) % (2 * BUFFERS)) {
        get_tiles(tiles, buffer, start == 0, k, k_stride, v, v_stride, start, end, n_key);
        __syncthreads();
        const Tile &keys = tiles[buffer], &values = tiles[buffer + 1];
        for (int c = 0; c < ROWS / 16; c++) {  // 16 keys
            int first_key = start + 16 * c;
            if (first_key > last_seen) break;
            Mask mask(key, use, threshold, place.head * n_query + first + row, first_key);
            Sum dscores[2];
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                Sum scores = {}, dp = {};
                multiply_rows(scores, queries, keys, 16 * c + 8 * half);
                multiply_rows(dp, gradients, values, 16 * c + 8 * half);
                const unsigned kept[2] = {mask.of(lane() / 4, half) >> column, mask.of(lane() / 4 + 8, half) >> column};
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    A p = power(unit * scores.at[j] - log_sum[j / 2]);
                    dscores[half].at[j] = p * (dp.at[j] * (kept[j / 2] & (1 << j % 2) ? keeping : 0) - row_term[j / 2]);
                }
            }
            if (past + first + row < first_key + 15) {  // some query does not see all keys
                #pragma unroll
                for (int half = 0; half < 2; half++)
                    #pragma unroll
                    for (int j = 0; j < 4; j++) {
                        bool is_future = first_key + 8 * half + column + j % 2 > past + query + j / 2 * 8;
                        dscores[half].at[j] = is_future ? 0 : dscores[half].at[j];
                    }
            }
            Left left(dscores[0], dscores[1]);
            multiply_columns<COLUMNS / 8>(sums, left, keys, 16 * c, place.part * COLUMNS);
        }
        __syncthreads();
    }
    const A factors[2] = {(A)scale, (A)scale};
    int left = place.part * COLUMNS;
    write_rows<COLUMNS / 8>(tiles[0], left, sums, factors);
    __syncthreads();
    store_tile(dq + place.start(n_query, dq_stride, heads), dq_stride, first, n_query, tiles[0], left, left + COLUMNS);
}

// dk = scale dscores^T @ q, and dv = dropout(p)^T @ dout. All small matrices here have keys as rows and queries as columns.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_OF_KEYS) attention_backward_keys(
    const T* q, const T* k, const T* v, const T* dout, const A* log_total, const A* row_terms, T* dk, T* dv, long long heads,
    long long n_query, long long n_key, long long q_stride, long long k_stride, long long v_stride, long long dk_stride,
    long long dv_stride, double scale, const unsigned long long* key, long long use, long long threshold,
    double kept_scale) {
    __shared__ Tile tiles[2 * BUFFERS];
    __shared__ A log_sums[BUFFERS][ROWS], terms[BUFFERS][ROWS];
    Place place(n_key, PARTS);
    const A unit = (A)(scale / LOG_OF_BASE), keeping = (A)kept_scale;
    int first = place.tile * ROWS;  // the first keys, which most queries see, come first
    int row = row_of_this_warp(), first_of_warp = first + row, row_of_heads = heads * HEAD_DIM;
    int past = n_key - n_query, first_query = first > past ? (first - past) / ROWS * ROWS : 0;
    q += place.start(n_query, q_stride, heads);
    dout += place.start(n_query, row_of_heads, heads);
    log_total += place.head * n_query;
    row_terms += place.head * n_query;

    load_tile(tiles[0], k + place.start(n_key, k_stride, heads), k_stride, first, n_key);
    load_tile(tiles[1], v + place.start(n_key, v_stride, heads), v_stride, first, n_key);
    end_batch();
    wait_for_batches<0>();
    __syncthreads();
    Left keys[D / 16], values[D / 16];
    read_rows(keys, tiles[0], row);
    read_rows(values, tiles[1], row);
    __syncthreads();

    Sum dk_sums[COLUMNS / 8] = {}, dv_sums[COLUMNS / 8] = {};
    for (int start = first_query, buffer = 0; start < n_query; start += ROWS, buffer = (buffer + 2) % (2 * BUFFERS)) {
        get_tiles(tiles, buffer, start == first_query, q, q_stride, dout, row_of_heads, start, n_query, n_query);
        if (threadIdx.x < ROWS) {
            bool is_there = start + (int)threadIdx.x < n_query;
            log_sums[buffer / 2][threadIdx.x] = is_there ? log_total[start + threadIdx.x] : 0;
            terms[buffer / 2][threadIdx.x] = is_there ? row_terms[start + threadIdx.x] : 0;
        }
        __syncthreads();
        const Tile &queries = tiles[buffer], &gradients = tiles[buffer + 1];
        for (int c = 0; c < ROWS / 16; c++) {  // 16 queries
            int first_query_of_chunk = start + 16 * c;
            if (first_query_of_chunk >= n_query) break;
            if (first_of_warp > past + first_query_of_chunk + 15) continue;
            Mask mask(key, use, threshold, place.head * n_query + first_query_of_chunk, first_of_warp);
            Sum p[2] = {}, kept_p[2], dscores[2] = {};
            unsigned kept = 0;  // bit i: element i of the two Sums
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                multiply_rows(p[half], keys, queries, 16 * c + 8 * half);  // the scores
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    int of_chunk = 8 * half + lane() % 4 * 2 + j % 2, of_tile = 16 * c + of_chunk;
                    p[half].at[j] = power(unit * p[half].at[j] - log_sums[buffer / 2][of_tile]);
                    if (first_of_warp + 15 > past + first_query_of_chunk)  // some query does not see all keys
                        p[half].at[j] = first_of_warp + lane() / 4 + j / 2 * 8 > past + start + of_tile ? 0 : p[half].at[j];
                    unsigned bit = mask.of(of_chunk, j / 2) >> lane() / 4 & 1;
                    kept_p[half].at[j] = bit ? p[half].at[j] * keeping : 0;
                    kept |= bit << (4 * half + j);
                }
            }
            multiply_columns<COLUMNS / 8>(
                dv_sums, Left(kept_p[0], kept_p[1]), gradients, 16 * c, place.part * COLUMNS);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                multiply_rows(dscores[half], values, gradients, 16 * c + 8 * half);  // dp
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    A dp = kept >> (4 * half + j) & 1 ? dscores[half].at[j] * keeping : 0;
                    int of_tile = 16 * c + 8 * half + lane() % 4 * 2 + j % 2;
                    dscores[half].at[j] = p[half].at[j] * (dp - terms[buffer / 2][of_tile]);
                }
            }
            multiply_columns<COLUMNS / 8>(
                dk_sums, Left(dscores[0], dscores[1]), queries, 16 * c, place.part * COLUMNS);
        }
        __syncthreads();
    }
    const A factors[2] = {(A)scale, (A)scale}, ones[2] = {1, 1};
    int left = place.part * COLUMNS;
    write_rows<COLUMNS / 8>(tiles[0], left, dk_sums, factors);
    write_rows<COLUMNS / 8>(tiles[1], left, dv_sums, ones);
    __syncthreads();
    store_tile(dk + place.start(n_key, dk_stride, heads), dk_stride, first, n_key, tiles[0], left, left + COLUMNS);
    store_tile(dv + place.start(n_key, dv_stride, heads), dv_stride, first, n_key, tiles[1], left, left + COLUMNS);
}
