// The way back through a table: rows of dy added up by id, always in the same order, so without atomic additions.

// A thread owns one column of a chunk of rows and has a table of its own for it: partial is (chunks, v, c), blockIdx.y the
// chunk. sum_of_rows then adds the tables up.
extern "C" __global__ void embedding_backward(
    const T* dy, const long long* ids, A* partial, long long n, long long c, long long v, long long chunk) {
    long long column = thread_number();
    if (column >= c) return;
    A* table = partial + blockIdx.y * v * c + column;
    for (long long id = 0; id < v; id++) table[id * c] = 0;
    long long first = blockIdx.y * chunk, last = first + chunk < n ? first + chunk : n;
    for (long long row = first; row < last; row++) table[ids[row] * c] += (A)dy[row * c + column];
}
