// Causal attention that never writes its scores to memory, forward and backward. The formulas are those of causal_attention in
// reference.py; the order of the computation is that of "FlashAttention-2" (Dao, 2023). Dropout acts on the probabilities.
//
// This file is compiled for one head_dim. A block computes ROWS rows of a result, 16 in each warp, for one head of one sequence.
// It goes through the other operands in tiles of ROWS rows. What is beyond the last row or column of an operand is 0 in a tile.
// On the way back, probabilities are computed again from the scores and from the logarithm of their sum.
//
// q, k, v and their gradients are (batch, n, heads, HEAD_DIM), with `stride` elements from one of the n rows to the next; the
// heads of a row lie side by side. out and dout are contiguous. The n_query queries are the last of the n_key positions.
// Heads of sequences are counted together, and arrays with a number for each query are (batch * heads, n_query).

const int D = (HEAD_DIM + 15) / 16 * 16;  // columns of a tile
const int STRIDE = D + 8;                 // elements from one row of a tile to the next: neighbours are in different banks
const int ROWS = 64;
const int PARTS = D > 64 ? 2 : 1;  // on the way back, a block computes one of so many parts of the columns
const int COLUMNS = D / PARTS;

// ---------------------------------------------------------------- tiles

struct alignas(16) Tile {
    T at[ROWS * STRIDE];
};

__device__ inline void copy_group(T* to, const T* from, long long count) {
    if (Group::is_whole(from, count) && Group::is_whole(to, count)) {
        #pragma unroll
        for (int i = 0; i < (int)(sizeof(T) * GROUP / 16); i++) ((Bytes16<T>*)to)[i] = ((const Bytes16<T>*)from)[i];
    } else {
        #pragma unroll
        for (int j = 0; j < GROUP; j++)
            if (j < count) to[j] = from[j];
    }
}

// tile (ROWS, D) = the rows from `first` on of an operand with `rows` rows.
__device__ inline void load_tile(T* tile, const T* from, long long stride, long long first, long long rows) {
    const int GROUPS = D / GROUP;
    #pragma unroll
    for (int i = threadIdx.x; i < ROWS * GROUPS; i += 2 * ROWS) {
        int row = i / GROUPS, column = i % GROUPS * GROUP;
        T* to = tile + row * STRIDE + column;
        if (first + row < rows) {
            copy_group(to, from + (first + row) * stride + column, HEAD_DIM - column);
            if (HEAD_DIM < D)
                for (int j = 0; j < GROUP; j++)
                    if (column + j >= HEAD_DIM) to[j] = (T)0.0f;
        } else {
            for (int j = 0; j < GROUP; j++) to[j] = (T)0.0f;
        }
    }
}

// The other way, for the columns from `left` to `right`.
__device__ inline void store_tile(T* to, long long stride, long long first, long long rows, const T* tile, int left, int right) {
    const int groups = (right - left) / (int)GROUP;
    for (int i = threadIdx.x; i < ROWS * groups; i += 2 * ROWS) {
        int row = i / groups, column = left + i % groups * (int)GROUP;
        if (first + row < rows)
            copy_group(to + (first + row) * stride + column, tile + row * STRIDE + column, HEAD_DIM - column);
    }
}

// A warp writes N Sums, times a factor for each of its two rows, to its rows of a tile, from column `left` on.
template <int N>
__device__ inline void write_rows(T* tile, int left, const Sum sums[N], const A factors[2]) {
    T* mine = tile + (threadIdx.x / WARP * 16 + lane() / 4) * STRIDE + left + lane() % 4 * 2;
    #pragma unroll
    for (int n = 0; n < N; n++) {
        *(Pair<T>*)(mine + 8 * n) = Pair<T>(sums[n].at[0] * factors[0], sums[n].at[1] * factors[0]);
        *(Pair<T>*)(mine + 8 * STRIDE + 8 * n) = Pair<T>(sums[n].at[2] * factors[1], sums[n].at[3] * factors[1]);
    }
}

// ---------------------------------------------------------------- what the kernels share

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }

// Which part of which result this block computes. Blocks with the same number of a tile follow each other.
struct Place {
    long long heads, head, tile;  // the number of heads of all sequences; one of them; a tile of its rows
    int part;

    __device__ Place(long long rows, int parts) {
        long long tiles = (rows + ROWS - 1) / ROWS;
        heads = gridDim.x / (tiles * parts);
        head = blockIdx.x % heads;
        part = (int)(blockIdx.x / heads % parts);
        tile = blockIdx.x / (heads * parts);
    }

    // Where this head begins in an operand of n rows.
    __device__ long long start(long long n, long long stride, long long heads_of_a_row) const {
        return head / heads_of_a_row * n * stride + head % heads_of_a_row * HEAD_DIM;
    }
};

// How many keys a query sees.
__device__ inline long long seen_by(long long query, long long n_query, long long n_key) {
    return query < n_query ? n_key - n_query + query + 1 : n_key;
}

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

// The dropout mask of 16 queries and 16 keys, from `query` (a row of all scores) and `first_key` on. Each thread holds 8 bits: those
// of query lane % 16, and of the first 8 keys or the others.
struct Mask {
    unsigned mine;

    __device__ Mask(const unsigned long long* key, long long use, long long threshold, long long query, long long first_key) {
        mine = 0xffu;
        if (!key) return;
        mine = 0;
        Draws draws(key, use, query + lane() % 16, first_key / GROUP + lane() / 16);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) mine |= (unsigned)(draws[j] >= threshold) << j;
    }

    // The 8 bits for a query, counted from the first, and for the first 8 keys (half 0) or the others.
    __device__ unsigned of(int query, int half) const { return __shfl_sync(0xffffffffu, mine, query + 16 * half); }
};

// ---------------------------------------------------------------- forward
//
// For each query: `top` is the largest score so far, `total` the sum of exp(score - top), and `sums` that of exp(score - top) v.
// When a larger score comes, the sums are multiplied by exp(top - new top).

extern "C" __global__ void attention_forward(
    const T* q, const T* k, const T* v, T* out, A* log_total, long long heads, long long n_query, long long n_key,
    long long q_stride, long long k_stride, long long v_stride, double scale, long long exact, const unsigned long long* key,
    long long use, long long threshold, double kept_scale) {
    __shared__ Tile key_tile, value_tile;
    T *keys = key_tile.at, *values = value_tile.at;
    Place place(n_query, 1);
    long long first = ((n_query + ROWS - 1) / ROWS - 1 - place.tile) * ROWS;  // the last queries, which see most, come first
    int row = threadIdx.x / WARP * 16;                                        // of this warp in a tile
    long long query = first + row + lane() / 4;                               // this thread has this query and query + 8
    const long long seen[2] = {seen_by(query, n_query, n_key), seen_by(query + 8, n_query, n_key)};
    long long most_seen = seen_by(first + row + 15, n_query, n_key);
    q += place.start(n_query, q_stride, heads);
    k += place.start(n_key, k_stride, heads);
    v += place.start(n_key, v_stride, heads);

    load_tile(keys, q, q_stride, first, n_query);
    __syncthreads();
    Left queries[D / 16];
    #pragma unroll
    for (int i = 0; i < D / 16; i++) queries[i] = Left(keys + row * STRIDE + 16 * i, STRIDE);
    __syncthreads();

    Sum sums[D / 8] = {};
    A top[2] = {minus_infinity(), minus_infinity()}, total[2] = {0, 0};
    for (long long start = 0; start < seen_by(first + ROWS - 1, n_query, n_key); start += ROWS) {
        load_tile(keys, k, k_stride, start, n_key);
        load_tile(values, v, v_stride, start, n_key);
        __syncthreads();

        Sum scores[ROWS / 8] = {};
        A new_top[2] = {top[0], top[1]};
        #pragma unroll
        for (int n = 0; n < ROWS / 8; n++) {
            if (start + 8 * n < most_seen) {
                #pragma unroll
                for (int i = 0; i < D / 16; i++)
                    multiply(
                        scores[n], queries[i].at, Right::transposed(keys + 8 * n * STRIDE + 16 * i, STRIDE).at, exact != 0);
            }
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                A& score = scores[n].at[j];
                score = start + 8 * n + lane() % 4 * 2 + j % 2 < seen[j / 2] ? (A)scale * score : minus_infinity();
                new_top[j / 2] = score > new_top[j / 2] ? score : new_top[j / 2];
            }
        }
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            new_top[i] = max_of_four(new_top[i]);
            A factor = fast_exp(top[i] - new_top[i]);
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
            if (start + 16 * c >= most_seen) continue;
            Mask mask(key, use, threshold, place.head * n_query + first + row, start + 16 * c);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const unsigned kept[2] = {mask.of(lane() / 4, half), mask.of(lane() / 4 + 8, half)};
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    A& p = scores[2 * c + half].at[j];
                    p = fast_exp(p - top[j / 2]);
                    total[j / 2] += p;
                    p = kept[j / 2] >> (lane() % 4 * 2 + j % 2) & 1 ? p : 0;
                }
            }
            Left p(scores[2 * c], scores[2 * c + 1]);
            #pragma unroll
            for (int n = 0; n < D / 8; n++) {
                Right part;
                load_right(part.at, values + 16 * c * STRIDE + 8 * n, STRIDE);
                multiply(sums[n], p.at, part.at, exact != 0);
            }
        }
        __syncthreads();
    }

    A factors[2];
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i] = sum_of_four(total[i]);
        factors[i] = (A)kept_scale / total[i];
        if (lane() % 4 == 0 && query + 8 * i < n_query)
            log_total[place.head * n_query + query + 8 * i] = top[i] + log(total[i]);
    }
    write_rows<D / 8>(keys, 0, sums, factors);
    __syncthreads();
    long long row_of_heads = heads * HEAD_DIM;
    store_tile(out + place.start(n_query, row_of_heads, heads), row_of_heads, first, n_query, keys, 0, D);
}

// ---------------------------------------------------------------- backward
//
// With p = exp(score - log_total) and dp = dropout(dout @ v^T), dscores = p (dp - row_term). The row term sum_j dp_j p_j of the
// softmax rule equals dout @ out.

// dq = scale dscores @ k. Also writes the row terms, which attention_backward_keys reads.
extern "C" __global__ void attention_backward_queries(
    const T* q, const T* k, const T* v, const T* out, const T* dout, const A* log_total, A* row_terms, T* dq, long long heads,
    long long n_query, long long n_key, long long q_stride, long long k_stride, long long v_stride, long long dq_stride,
    double scale, long long exact, const unsigned long long* key, long long use, long long threshold, double kept_scale) {
    __shared__ Tile key_tile, value_tile;
    T *keys = key_tile.at, *values = value_tile.at;
    Place place(n_query, PARTS);
    long long first = ((n_query + ROWS - 1) / ROWS - 1 - place.tile) * ROWS;
    int row = threadIdx.x / WARP * 16;
    long long query = first + row + lane() / 4;
    const long long seen[2] = {seen_by(query, n_query, n_key), seen_by(query + 8, n_query, n_key)};
    long long most_seen = seen_by(first + row + 15, n_query, n_key), row_of_heads = heads * HEAD_DIM;
    k += place.start(n_key, k_stride, heads);
    v += place.start(n_key, v_stride, heads);

    // The tiles are used for the queries, their results and gradients first.
    load_tile(keys, out + place.start(n_query, row_of_heads, heads), row_of_heads, first, n_query);
    load_tile(values, dout + place.start(n_query, row_of_heads, heads), row_of_heads, first, n_query);
    __syncthreads();
    Left queries[D / 16], gradients[D / 16];
    A row_term[2] = {0, 0}, log_sum[2];
    #pragma unroll
    for (int i = 0; i < D / 16; i++) {
        Left result(keys + row * STRIDE + 16 * i, STRIDE);
        gradients[i] = Left(values + row * STRIDE + 16 * i, STRIDE);
        #pragma unroll
        for (int j = 0; j < 4; j++)
            row_term[j % 2] +=
                result.at[j].first() * gradients[i].at[j].first() + result.at[j].second() * gradients[i].at[j].second();
    }
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        row_term[i] = sum_of_four(row_term[i]);
        bool is_there = query + 8 * i < n_query;
        long long at = place.head * n_query + query + 8 * i;
        log_sum[i] = is_there ? log_total[at] : 0;
        if (is_there && lane() % 4 == 0 && place.part == 0) row_terms[at] = row_term[i];
    }
    __syncthreads();
    load_tile(keys, q + place.start(n_query, q_stride, heads), q_stride, first, n_query);
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < D / 16; i++) queries[i] = Left(keys + row * STRIDE + 16 * i, STRIDE);
    __syncthreads();

    Sum sums[COLUMNS / 8] = {};
    for (long long start = 0; start < seen_by(first + ROWS - 1, n_query, n_key); start += ROWS) {
        load_tile(keys, k, k_stride, start, n_key);
        load_tile(values, v, v_stride, start, n_key);
        __syncthreads();
        for (int c = 0; c < ROWS / 16; c++) {  // 16 keys
            if (start + 16 * c >= most_seen) break;
            Mask mask(key, use, threshold, place.head * n_query + first + row, start + 16 * c);
            Sum dscores[2];
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                Sum scores = {}, dp = {};
                int at = (16 * c + 8 * half) * STRIDE;
                #pragma unroll
                for (int i = 0; i < D / 16; i++) {
                    multiply(scores, queries[i].at, Right::transposed(keys + at + 16 * i, STRIDE).at, exact != 0);
                    multiply(dp, gradients[i].at, Right::transposed(values + at + 16 * i, STRIDE).at, exact != 0);
                }
                const unsigned kept[2] = {mask.of(lane() / 4, half), mask.of(lane() / 4 + 8, half)};
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    int column = lane() % 4 * 2 + j % 2;
                    A p = fast_exp((A)scale * scores.at[j] - log_sum[j / 2]);
                    p = start + 16 * c + 8 * half + column < seen[j / 2] ? p : 0;
                    dscores[half].at[j] = p * ((kept[j / 2] >> column & 1 ? dp.at[j] * (A)kept_scale : 0) - row_term[j / 2]);
                }
            }
            Left left(dscores[0], dscores[1]);
            #pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
                Right part;
                load_right(part.at, keys + 16 * c * STRIDE + place.part * COLUMNS + 8 * n, STRIDE);
                multiply(sums[n], left.at, part.at, exact != 0);
            }
        }
        __syncthreads();
    }
    const A factors[2] = {(A)scale, (A)scale};
    write_rows<COLUMNS / 8>(keys, place.part * COLUMNS, sums, factors);
    __syncthreads();
    store_tile(
        dq + place.start(n_query, dq_stride, heads), dq_stride, first, n_query, keys, place.part * COLUMNS,
        (place.part + 1) * COLUMNS);
}

// dk = scale dscores^T @ q, and dv = dropout(p)^T @ dout. All small matrices here have keys as rows and queries as columns.
extern "C" __global__ void attention_backward_keys(
    const T* q, const T* k, const T* v, const T* dout, const A* log_total, const A* row_terms, T* dk, T* dv, long long heads,
    long long n_query, long long n_key, long long q_stride, long long k_stride, long long v_stride, long long dk_stride,
    long long dv_stride, double scale, long long exact, const unsigned long long* key, long long use, long long threshold,
    double kept_scale) {
    __shared__ Tile query_tile, gradient_tile;
    T *queries = query_tile.at, *gradients = gradient_tile.at;
    __shared__ A log_sums[ROWS], terms[ROWS];
    Place place(n_key, PARTS);
    long long first = place.tile * ROWS;  // the first keys come first: most queries see them
    int row = threadIdx.x / WARP * 16;
    long long first_of_warp = first + row, row_of_heads = heads * HEAD_DIM;
    q += place.start(n_query, q_stride, heads);
    dout += place.start(n_query, row_of_heads, heads);
    log_total += place.head * n_query;
    row_terms += place.head * n_query;

    load_tile(queries, k + place.start(n_key, k_stride, heads), k_stride, first, n_key);
    load_tile(gradients, v + place.start(n_key, v_stride, heads), v_stride, first, n_key);
    __syncthreads();
    Left keys[D / 16], values[D / 16];
    #pragma unroll
    for (int i = 0; i < D / 16; i++) {
        keys[i] = Left(queries + row * STRIDE + 16 * i, STRIDE);
        values[i] = Left(gradients + row * STRIDE + 16 * i, STRIDE);
    }
    __syncthreads();

    Sum dk_sums[COLUMNS / 8] = {}, dv_sums[COLUMNS / 8] = {};
    long long past = n_key - n_query, first_query = first > past ? (first - past) / ROWS * ROWS : 0;
    for (long long start = first_query; start < n_query; start += ROWS) {
        load_tile(queries, q, q_stride, start, n_query);
        load_tile(gradients, dout, row_of_heads, start, n_query);
        for (int i = threadIdx.x; i < ROWS; i += 2 * ROWS) {
            log_sums[i] = start + i < n_query ? log_total[start + i] : 0;
            terms[i] = start + i < n_query ? row_terms[start + i] : 0;
        }
        __syncthreads();
        for (int c = 0; c < ROWS / 16; c++) {  // 16 queries
            if (start + 16 * c >= n_query) break;
            if (first_of_warp >= seen_by(start + 16 * c + 15, n_query, n_key)) continue;
            Mask mask(key, use, threshold, place.head * n_query + start + 16 * c, first_of_warp);
            Sum dscores[2], kept_p[2];
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                Sum scores = {}, dp = {};
                int at = (16 * c + 8 * half) * STRIDE;
                #pragma unroll
                for (int i = 0; i < D / 16; i++) {
                    multiply(scores, keys[i].at, Right::transposed(queries + at + 16 * i, STRIDE).at, exact != 0);
                    multiply(dp, values[i].at, Right::transposed(gradients + at + 16 * i, STRIDE).at, exact != 0);
                }
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    int of_chunk = 8 * half + lane() % 4 * 2 + j % 2, of_tile = 16 * c + of_chunk;
                    long long query = start + of_tile;
                    bool sees = query < n_query && first_of_warp + lane() / 4 + j / 2 * 8 < seen_by(query, n_query, n_key);
                    A p = sees ? fast_exp((A)scale * scores.at[j] - log_sums[of_tile]) : 0;
                    A kept = mask.of(of_chunk, j / 2) >> (lane() / 4) & 1 ? (A)kept_scale : 0;
                    kept_p[half].at[j] = p * kept;
                    dscores[half].at[j] = p * (dp.at[j] * kept - terms[of_tile]);
                }
            }
            Left left_v(kept_p[0], kept_p[1]), left_k(dscores[0], dscores[1]);
            #pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
                Right part;
                int at = 16 * c * STRIDE + place.part * COLUMNS + 8 * n;
                load_right(part.at, gradients + at, STRIDE);
                multiply(dv_sums[n], left_v.at, part.at, exact != 0);
                load_right(part.at, queries + at, STRIDE);
                multiply(dk_sums[n], left_k.at, part.at, exact != 0);
            }
        }
        __syncthreads();
    }
    const A factors[2] = {(A)scale, (A)scale}, ones[2] = {1, 1};
    int left = place.part * COLUMNS;
    write_rows<COLUMNS / 8>(queries, left, dk_sums, factors);
    write_rows<COLUMNS / 8>(gradients, left, dv_sums, ones);
    __syncthreads();
    store_tile(dk + place.start(n_key, dk_stride, heads), dk_stride, first, n_key, queries, left, left + COLUMNS);
    store_tile(dv + place.start(n_key, dv_stride, heads), dv_stride, first, n_key, gradients, left, left + COLUMNS);
}
