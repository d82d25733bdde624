// Sums over the rows of a matrix (n, c), always in the same order: no atomic additions of numbers.
//
// Block (i, j) adds up chunk j of the rows, for 256 columns. A thread has one group of columns, and the warps share the rows. The
// last one of the blocks (i, ...) to come to its end adds up the chunks. So a sum is one launch.

const int MAX_WARPS = 8;                        // of a block
const int BLOCK_COLUMNS = WARP * (int)GROUP;    // columns of a block

// The first of this thread's columns.
__device__ inline long long first_column() { return blockIdx.x * (long long)BLOCK_COLUMNS + lane() * GROUP; }

// Whether this is the last block of its columns to come here. `arrived` counts them, for each blockIdx.x; it is 0 before and after.
__device__ inline bool is_last(unsigned* arrived) {
    __shared__ bool last;
    __threadfence();  // what this block wrote is there for the last one
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrived + blockIdx.x, 1u) == gridDim.y - 1;
        if (last) arrived[blockIdx.x] = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// N sums at the same time, in shared memory.
template <int N>
struct Sums {
    A of_warp[N][MAX_WARPS][BLOCK_COLUMNS];

    // of_warp[...][0] = the sums over the rows from `first` to `last`. load(row, values) finds what a row adds to this thread's columns.
    template <typename Load>
    __device__ void add_up(long long first, long long last, Load load) {
        int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
        Group sums[N] = {}, values[N];
        #pragma unroll 4  // so that several loads are under way at once
        for (long long row = first + warp; row < last; row += warps) {
            load(row, values);
            #pragma unroll
            for (int i = 0; i < N; i++)
                #pragma unroll
                for (int j = 0; j < GROUP; j++) sums[i].at[j] += values[i].at[j];
        }
        for (int i = 0; i < N; i++)
            for (int j = 0; j < GROUP; j++) of_warp[i][warp][lane() * GROUP + j] = sums[i].at[j];
        __syncthreads();
        for (int column = threadIdx.x; column < BLOCK_COLUMNS; column += blockDim.x)
            for (int i = 0; i < N; i++)
                for (int w = 1; w < warps; w++) of_warp[i][0][column] += of_warp[i][w][column];
        __syncthreads();
    }

    // results[i] (c,) = sum i over all chunks, plus what results[i] holds if add[i]. partial is (chunks, N, c).
    __device__ void finish(A* const results[N], const bool add[N], A* partial, unsigned* arrived, long long c) {
        long long start = blockIdx.x * (long long)BLOCK_COLUMNS;
        for (int column = threadIdx.x; column < BLOCK_COLUMNS && start + column < c; column += blockDim.x)
            for (int i = 0; i < N; i++) partial[(blockIdx.y * N + i) * c + start + column] = of_warp[i][0][column];
        if (!is_last(arrived)) return;
        long long mine = first_column();
        add_up(0, gridDim.y, [=](long long chunk, Group values[N]) {
            for (int i = 0; i < N; i++) values[i].load(partial + (chunk * N + i) * c + mine, c - mine);
        });
        for (int column = threadIdx.x; column < BLOCK_COLUMNS && start + column < c; column += blockDim.x)
            for (int i = 0; i < N; i++) {
                A* result = results[i] + start + column;
                *result = of_warp[i][0][column] + (add[i] ? *result : (A)0);
            }
    }
};

// y (c,) = the sums over the rows of x (n, c), plus what y holds if `add`.
extern "C" __global__ void column_sums(
    const T* x, A* y, A* partial, unsigned* arrived, long long n, long long c, long long chunk, long long add) {
    __shared__ Sums<1> sums;
    A* const results[1] = {y};
    const bool adds[1] = {add != 0};
    long long column = first_column(), first = blockIdx.y * chunk, last = first + chunk < n ? first + chunk : n;
    sums.add_up(first, last, [=](long long row, Group values[1]) { values[0].load(x + row * c + column, c - column); });
    sums.finish(results, adds, partial, arrived, c);
}

// The same for a few rows of many columns, in one block for each 32 columns. x (n, c) has the type of sums.
extern "C" __global__ void sum_of_rows(const A* x, A* y, long long n, long long c, long long add) {
    __shared__ A of_warp[MAX_WARPS][WARP];
    int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    long long column = blockIdx.x * (long long)WARP + lane();
    A sum = 0;
    if (column < c) {
        #pragma unroll 8
        for (long long row = warp; row < n; row += warps) sum += x[row * c + column];
    }
    of_warp[warp][lane()] = sum;
    __syncthreads();
    if (warp > 0 || column >= c) return;
    for (int i = 1; i < warps; i++) sum += of_warp[i][lane()];
    y[column] = add ? y[column] + sum : sum;
}
