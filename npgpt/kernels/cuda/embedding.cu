// The gradient of an embedding table: the rows of dy, added up by id. The order is always the same: no atomic additions.

// A thread adds up one column of chunk blockIdx.y, into that column of the chunk's table. partial (chunks, v, c) holds the
// tables. Afterwards sum_of_rows adds up the tables.
extern "C" __global__ void embedding_backward(
    const T* dy, const long long* ids, A* partial, long long n, long long c, long long v, long long chunk) {
    long long column = thread_number();
    if (column >= c) return;
    A* table = partial + blockIdx.y * v * c + column;
    for (long long id = 0; id < v; id++) table[id * c] = 0;
    long long first = blockIdx.y * chunk, last = first + chunk < n ? first + chunk : n;
    for (long long row = first; row < last; row++) table[ids[row] * c] += (A)dy[row * c + column];
}
