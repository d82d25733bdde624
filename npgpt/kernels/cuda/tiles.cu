// Tiles: 64 rows of a matrix with HEAD_DIM columns in shared memory, and a warp's products with rows and columns of them.
//
// This file follows common.cu and tensor_cores.cu, and is compiled for one head_dim. What is beyond the last row or column of the
// matrix is 0 in a tile.

const int D = (HEAD_DIM + 15) / 16 * 16;  // columns of a tile
const int STRIDE = D + 8;                 // elements from one row of a tile to the next: 8 rows begin in different banks
const int ROWS = 64;
const int THREADS = ROWS / 16 * WARP;

struct alignas(16) Tile {
    T at[ROWS * STRIDE];
};

// With two buffers of two tiles, the next tiles are copied during the computation. A block has at most 48 KiB, also for other things.
const int BUFFERS = 4 * sizeof(Tile) <= 40 << 10 ? 2 : 1;

// tile = the rows from `first` on of an operand with `rows` rows. The copies belong to this thread's next batch. A copy of 0 bytes
// reads nothing, so its address may be past the end.
__device__ inline void load_tile(Tile& tile, const T* from, int stride, int first, int rows) {
    const int SIZE = 16 / sizeof(T);  // elements of 16 bytes
    const int WIDTH = D > 8 * SIZE ? 16 : D > 4 * SIZE ? 8 : D > 2 * SIZE ? 4 : 2;  // threads for a row
    from += (long long)first * stride;
    rows -= first;
    if (((unsigned long long)from | stride * sizeof(T)) % 16 == 0) {
        int column = threadIdx.x % WIDTH * SIZE, row = threadIdx.x / WIDTH, count = HEAD_DIM - column;
        if (column >= D) return;
        count = count < 0 ? 0 : count < SIZE ? count : SIZE;
        const T* source = from + row * stride + column;
        #pragma unroll
        for (int i = 0; i < ROWS; i += THREADS / WIDTH, source += THREADS / WIDTH * stride)
            begin_to_copy(
                tile.at + (row + i) * STRIDE + column, source, row + i < rows ? count * (int)sizeof(T) : 0);
    } else {
        #pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
            int row = i / D, column = i % D;
            tile.at[row * STRIDE + column] = row < rows && column < HEAD_DIM ? from[row * stride + column] : (T)0.0f;
        }
    }
}

// Tiles `buffer` (0 or 2) and `buffer + 1` = the rows from `start` on of the operands a and b. With two buffers, the tiles after them
// are then being copied to the other buffer, if they begin before `end`. The caller lets all threads meet before and after.
__device__ inline void get_tiles(
    Tile* tiles, int buffer, bool are_first, const T* a, int a_stride, const T* b, int b_stride, int start, int end, int rows) {
    if (BUFFERS == 1 || are_first) {
        load_tile(tiles[buffer], a, a_stride, start, rows);
        load_tile(tiles[buffer + 1], b, b_stride, start, rows);
        end_batch();
    }
    if (BUFFERS == 2 && start + ROWS < end) {
        load_tile(tiles[2 - buffer], a, a_stride, start + ROWS, rows);
        load_tile(tiles[3 - buffer], b, b_stride, start + ROWS, rows);
        end_batch();
        wait_for_batches<1>();
    } else {
        wait_for_batches<0>();
    }
}

// Write the columns from `left` to `right` of a tile to memory.
__device__ inline void store_tile(T* to, int stride, int first, int rows, const Tile& tile, int left, int right) {
    const int groups = (right - left) / (int)GROUP;
    to += (long long)first * stride;
    #pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * groups; i += THREADS) {
        int row = i / groups, column = left + i % groups * (int)GROUP;
        if (first + row >= rows) break;
        const T* from = tile.at + row * STRIDE + column;
        T* target = to + row * stride + column;
        if (Group::is_whole(target, HEAD_DIM - column)) {
            #pragma unroll
            for (int j = 0; j < (int)(sizeof(T) * GROUP / 16); j++) ((Bytes16<T>*)target)[j] = ((const Bytes16<T>*)from)[j];
        } else {
            for (int j = 0; j < GROUP; j++)
                if (column + j < HEAD_DIM) target[j] = from[j];
        }
    }
}

// A warp writes N Sums, times a factor for each of its two rows, to its rows of a tile, from column `left` on.
template <int N>
__device__ inline void write_rows(Tile& tile, int left, const Sum sums[N], const A factors[2]) {
    T* mine = tile.at + (threadIdx.x / WARP * 16 + lane() / 4) * STRIDE + left + lane() % 4 * 2;
    #pragma unroll
    for (int n = 0; n < N; n++) {
        *(Pair<T>*)(mine + 8 * n) = Pair<T>(sums[n].at[0] * factors[0], sums[n].at[1] * factors[0]);
        *(Pair<T>*)(mine + 8 * STRIDE + 8 * n) = Pair<T>(sums[n].at[2] * factors[1], sums[n].at[3] * factors[1]);
    }
}

// The 16 rows of a warp, from row `row` of a tile on.
__device__ inline void read_rows(Left rows[D / 16], const Tile& tile, int row) {
    #pragma unroll
    for (int i = 0; i < D / 16; i++) rows[i] = Left(tile.at + row * STRIDE + 16 * i, STRIDE);
}

// sum (16, 8) += left (16, D) @ the transpose of 8 rows, from row `row` of a tile on.
__device__ inline void multiply_rows(Sum& sum, const Left left[D / 16], const Tile& tile, int row) {
    #pragma unroll
    for (int i = 0; i < D / 16; i++)
        multiply(sum, left[i].at, Right::transposed(tile.at + row * STRIDE + 16 * i, STRIDE).at);
}

// sums (16, 8 N) += left (16, 16) @ 16 rows, from row `row` of a tile on, and 8 N columns, from column `column` on.
template <int N>
__device__ inline void multiply_columns(Sum sums[N], const Left& left, const Tile& tile, int row, int column) {
    #pragma unroll
    for (int n = 0; n < N; n++) {
        Right right;
        load_right(right.at, tile.at + row * STRIDE + column + 8 * n, STRIDE);
        multiply(sums[n], left.at, right.at);
    }
}
