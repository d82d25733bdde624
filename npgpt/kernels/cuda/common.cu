// What all kernels share: the types, sums over a warp, random numbers. Read first; the other files follow it in one module.
//
// A module is compiled for one element type: T is what activations and their gradients are held in, A what is computed in,
// and what parameters, their gradients and losses are held in. Scalars come as long long and double. A row of a matrix is
// the work of one warp (32 threads), unless a kernel says otherwise.

// The upper half of a float: its range, with 8 bits of precision. Converting rounds to the nearest, of two to the even one.
struct bfloat16 {
    unsigned short bits;

    bfloat16() = default;

    __device__ bfloat16(float value) {
        unsigned all = __float_as_uint(value);
        bool nan = (all & 0x7fffffffu) > 0x7f800000u;  // rounding up could make it an infinity
        bits = (unsigned short)(nan ? all >> 16 | 0x40u : (all + 0x7fffu + (all >> 16 & 1u)) >> 16);
    }

    __device__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
};

typedef SCALAR T;
typedef ACCUMULATOR A;

const int WARP = 32;
const long long GROUP = 8;  // elements that share one call of the random number generator

__device__ inline int lane() { return threadIdx.x % WARP; }

__device__ inline long long row_of_warp() { return (long long)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; }

__device__ inline long long thread_number() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ inline long long thread_count() { return (long long)gridDim.x * blockDim.x; }

// The same sum, in the same order, in every thread of the warp.
__device__ inline A warp_sum(A value) {
    for (int distance = WARP / 2; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

__device__ inline A warp_max(A value) {
    for (int distance = WARP / 2; distance; distance /= 2) {
        A other = __shfl_xor_sync(0xffffffffu, value, distance);
        value = other > value ? other : value;
    }
    return value;
}

// Philox4x32-10, "Parallel random numbers: as easy as 1, 2, 3" (Salmon et al., 2011): 128 random bits as a function of a key
// and a counter, so that whoever needs the same numbers again computes them again.
__device__ inline void philox(const unsigned counter[4], unsigned long long key, unsigned out[4]) {
    unsigned a = counter[0], b = counter[1], c = counter[2], d = counter[3];
    unsigned k0 = (unsigned)key, k1 = (unsigned)(key >> 32);
    for (int round = 0; round < 10; round++) {
        unsigned long long first = 0xD2511F53ull * a, second = 0xCD9E8D57ull * c;
        a = (unsigned)(second >> 32) ^ b ^ k0;
        b = (unsigned)second;
        c = (unsigned)(first >> 32) ^ d ^ k1;
        d = (unsigned)first;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = a;
    out[1] = b;
    out[2] = c;
    out[3] = d;
}

// Draws for the elements 8 g to 8 g + 7 of a row in the use'th operation that draws with this key: 16 bits each.
struct Draws {
    unsigned words[4];

    __device__ Draws(unsigned long long key, long long use, long long row, long long group) {
        const unsigned counter[4] = {(unsigned)group, (unsigned)row, (unsigned)(row >> 32), (unsigned)use};
        philox(counter, key, words);
    }

    __device__ long long operator[](int i) const { return words[i / 2] >> 16 * (i % 2) & 0xffffu; }
};
