// The gradient of an embedding table: the rows of dy, added up by id. The order is always the same: no atomic additions.

// For small tables. A thread adds up one column of chunk blockIdx.y, into that column of the chunk's table. partial (chunks, v, c)
// holds the tables. Afterwards sum_of_rows adds up the tables.
extern "C" __global__ void embedding_backward(
    const T* dy, const long long* ids, A* partial, long long n, long long c, long long v, long long chunk) {
    long long column = thread_number();
    if (column >= c) return;
    A* table = partial + blockIdx.y * v * c + column;
    for (long long id = 0; id < v; id++) table[id * c] = 0;
    long long first = blockIdx.y * chunk, last = first + chunk < n ? first + chunk : n;
    for (long long row = first; row < last; row++) table[ids[row] * c] += (A)dy[row * c + column];
}

// For large tables. table (v, c) = the gradient, or += the gradient if `add`. A warp looks for the rows of one id.
extern "C" __global__ void embedding_backward_by_id(
    const T* dy, const long long* ids, A* table, long long n, long long c, long long v, long long add) {
    long long id = row_of_warp();
    if (id >= v) return;
    table += id * c;
    for (long long i = lane(); i < c && !add; i += WARP) table[i] = 0;
    for (long long first = 0; first < n; first += WARP) {
        unsigned found = __ballot_sync(0xffffffffu, first + lane() < n && ids[first + lane()] == id);
        for (; found; found &= found - 1) {  // the lowest bit that is set, then the next one
            const T* row = dy + (first + __ffs(found) - 1) * c;
            for (long long i = lane(); i < c; i += WARP) table[i] += (A)row[i];
        }
    }
}
