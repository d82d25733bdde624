// What all kernels share: types, reductions over a warp, random numbers. The other files follow this one in one module.
//
// A module is compiled for one element type. T is the type of activations and their gradients. A is the type of parameters,
// their gradients, losses and all intermediate results. Scalar arguments are long long or double. One warp (32 threads)
// works on one row of a matrix, unless a kernel's comment says otherwise.

// The upper half of a float: the same range, 8 bits of precision. A conversion rounds to the nearest value, ties to even.
struct bfloat16 {
    unsigned short bits;

    bfloat16() = default;

    __device__ bfloat16(float value) {
        unsigned all = __float_as_uint(value);
        bool nan = (all & 0x7fffffffu) > 0x7f800000u;  // rounding would turn some NaNs into infinity
        bits = (unsigned short)(nan ? all >> 16 | 0x40u : (all + 0x7fffu + (all >> 16 & 1u)) >> 16);
    }

    __device__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
};

typedef SCALAR T;
typedef ACCUMULATOR A;

const int WARP = 32;
const long long GROUP = 8;  // neighbouring elements that one thread works on; they share one call of the random number generator

__device__ inline int lane() { return threadIdx.x % WARP; }

__device__ inline long long row_of_warp() { return (long long)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; }

__device__ inline long long thread_number() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ inline long long thread_count() { return (long long)gridDim.x * blockDim.x; }

// What one instruction reads or writes: 16 bytes.
template <typename Element>
struct alignas(16) Bytes16 {
    Element at[16 / sizeof(Element)];
};

// A group of neighbouring elements, in registers. `count` says how many of them there are in memory; it may be larger than GROUP.
struct Group {
    A at[GROUP];

    template <typename Element>
    __device__ static bool is_whole(const Element* address, long long count) {
        return count >= GROUP && (unsigned long long)address % 16 == 0;
    }

    template <typename Element>
    __device__ void load_whole(const Element* from) {
        const int SIZE = 16 / sizeof(Element);
        #pragma unroll
        for (int i = 0; i < GROUP / SIZE; i++) {
            Bytes16<Element> bytes = ((const Bytes16<Element>*)from)[i];
            #pragma unroll
            for (int j = 0; j < SIZE; j++) at[i * SIZE + j] = (A)bytes.at[j];
        }
    }

    template <typename Element>
    __device__ void store_whole(Element* to) const {
        const int SIZE = 16 / sizeof(Element);
        #pragma unroll
        for (int i = 0; i < GROUP / SIZE; i++) {
            Bytes16<Element> bytes;
            #pragma unroll
            for (int j = 0; j < SIZE; j++) bytes.at[j] = (Element)at[i * SIZE + j];
            ((Bytes16<Element>*)to)[i] = bytes;
        }
    }

    template <typename Element>
    __device__ void load(const Element* from, long long count) {
        if (is_whole(from, count)) {
            load_whole(from);
        } else {
            #pragma unroll
            for (int j = 0; j < GROUP; j++) at[j] = j < count ? (A)from[j] : (A)0;
        }
    }

    template <typename Element>
    __device__ void store(Element* to, long long count) const {
        if (is_whole(to, count)) {
            store_whole(to);
        } else {
            #pragma unroll
            for (int j = 0; j < GROUP; j++)
                if (j < count) to[j] = (Element)at[j];
        }
    }
};

// exp for results that will be rounded to T. For 8 bits of precision, the approximation of the hardware is enough.
__device__ inline A fast_exp(A x) { return sizeof(T) == 2 ? (A)__expf((float)x) : exp(x); }

// Every thread of the warp gets the same sum, added up in the same order.
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
// and a counter. A backward pass computes the random numbers of its forward pass again, so masks are never stored.
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

// The draws of the 8 elements of one group of a row, 16 bits each. `use` numbers the operations that draw with this key. The key
// is in device memory, so that a recorded step can be replayed with another one. Without a key, every draw is the largest.
struct Draws {
    unsigned words[4];

    __device__ Draws(const unsigned long long* key, long long use, long long row, long long group) {
        const unsigned counter[4] = {(unsigned)group, (unsigned)row, (unsigned)(row >> 32), (unsigned)use};
        if (key)
            philox(counter, *key, words);
        else
            for (int i = 0; i < 4; i++) words[i] = 0xffffffffu;
    }

    __device__ long long operator[](int i) const { return words[i / 2] >> 16 * (i % 2) & 0xffffu; }
};
