// Sums over the rows of a matrix (n, c), always in the same order: no atomic additions of numbers.

const int MAX_WARPS = 8;                      // of a block
const int BLOCK_COLUMNS = WARP * (int)GROUP;  // columns of a block: one group for each thread of a warp

// Sums of 256 columns, in shared memory. The warps of a block share the rows.
struct ColumnSums {
    A of_warp[MAX_WARPS][BLOCK_COLUMNS];

    // of_warp[0] = the sum over all warps. Each thread has added up its rows of one group of columns.
    __device__ void add_up(const Group& sum) {
        int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
        #pragma unroll
        for (int j = 0; j < GROUP; j++) of_warp[warp][lane() * GROUP + j] = sum.at[j];
        __syncthreads();
        for (int column = threadIdx.x; column < BLOCK_COLUMNS; column += blockDim.x)
            for (int w = 1; w < warps; w++) of_warp[0][column] += of_warp[w][column];
        __syncthreads();
    }

    // of_warp[0] = the sums over the rows of x (n, c) from `first` to `last`, for the columns from `start` on.
    template <typename Element>
    __device__ void add_up(const Element* x, long long first, long long last, long long start, long long c) {
        int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
        long long mine = start + lane() * GROUP;
        Group sum = {}, values = {};
        if (c % GROUP == 0 && (unsigned long long)x % 16 == 0) {
            #pragma unroll 8  // so that several loads are under way at once
            for (long long row = first + warp; row < last; row += warps) {
                if (mine < c) values.load_whole(x + row * c + mine);
                #pragma unroll
                for (int j = 0; j < GROUP; j++) sum.at[j] += values.at[j];
            }
        } else {
            for (long long row = first + warp; row < last; row += warps) {
                values.load(x + row * c + mine, c - mine);
                for (int j = 0; j < GROUP; j++) sum.at[j] += values.at[j];
            }
        }
        add_up(sum);
    }
};

// Whether this is the last block of its columns to come here. `arrived` counts them, for each blockIdx.x. It is 0 before the first
// and after the last.
__device__ inline bool is_last(unsigned* arrived) {
    __shared__ bool last;
    __threadfence();  // what this block wrote is there for the last one
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrived + blockIdx.x, 1u) == gridDim.y - 1;
        if (last) arrived[blockIdx.x] = 0;
    }
    __syncthreads();
    __threadfence();  // what the other blocks wrote is read after this
    return last;
}

// y (c,) = the sums over the rows of x (n, c), plus what y holds if `add`. Block (i, j) adds up chunk j of the rows, for 256
// columns, and writes to partial (chunks, c). The last one of the blocks (i, ...) to come to its end adds up the chunks.
extern "C" __global__ void column_sums(
    const T* x, A* y, A* partial, unsigned* arrived, long long n, long long c, long long chunk, long long add) {
    __shared__ ColumnSums sums;
    long long first = blockIdx.y * chunk, last = first + chunk < n ? first + chunk : n, start = blockIdx.x * BLOCK_COLUMNS;
    sums.add_up(x, first, last, start, c);
    for (long long column = threadIdx.x; column < BLOCK_COLUMNS && start + column < c; column += blockDim.x)
        partial[blockIdx.y * c + start + column] = sums.of_warp[0][column];
    if (!is_last(arrived)) return;
    sums.add_up(partial, 0, gridDim.y, start, c);
    for (long long column = threadIdx.x; column < BLOCK_COLUMNS && start + column < c; column += blockDim.x)
        y[start + column] = sums.of_warp[0][column] + (add ? y[start + column] : (A)0);
}

// y (c,) = the sums over the rows of x (n, c), plus what y holds if add_y. If z is not null, x is (n, 2, c), and z gets the sums
// of the second half. A block adds up 32 columns.
extern "C" __global__ void sum_of_rows(
    const A* x, A* y, A* z, long long n, long long c, long long add_y, long long add_z) {
    __shared__ A of_warp[MAX_WARPS][WARP];
    int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    long long column = blockIdx.x * (long long)WARP + lane(), width = z ? 2 * c : c;
    A sum = 0;
    if (column < width) {
        #pragma unroll 8
        for (long long row = warp; row < n; row += warps) sum += x[row * width + column];
    }
    of_warp[warp][lane()] = sum;
    __syncthreads();
    if (warp > 0 || column >= width) return;
    for (int i = 1; i < warps; i++) sum += of_warp[i][lane()];
    A* result = column < c ? y + column : z + column - c;
    *result = (column < c ? add_y : add_z) ? *result + sum : sum;
}
