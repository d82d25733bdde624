// Small matrices that a warp holds in its registers, their products on tensor cores, and asynchronous copies to shared memory.
// What is multiplied is decided in attention.cu.
//
// The 32 threads of a warp are 8 groups of 4. "PTX ISA", sections on mma and ldmatrix, says which thread holds which elements:
//
//   Left (16, 16)    rows g and g + 8; columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9
//   Right (16, 8)    rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9; column g
//   Sum (16, 8)      rows g and g + 8; columns 2 t and 2 t + 1
//
// for thread t of group g. Their order in registers: Left.at has the pairs (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8);
// Sum.at[j] is at row g + 8 (j / 2), column 2 t + j % 2. So two Sums side by side are a Left, and no thread needs another's numbers.
//
// Tensor cores multiply bfloat16 and TF32, which has 10 bits of mantissa, and add up in float32. For TF32, their columns are t and
// t + 4 of 8. Here they get 2 t and 2 t + 1 in Left and in Right: the order of the terms is another one, but not the sum.
//
// This file follows common.cu. T is bfloat16 or float, so A is float.

// ---------------------------------------------------------------- instructions

#ifndef EMULATED_TENSOR_CORES  // tests/support/cuda_on_cpu.cpp has these functions for a CPU

// sum (16, 8) += left (16, 16) @ right (16, 8), in bfloat16, two elements in one register.
__device__ inline void multiply_bfloat16(float sum[4], const unsigned left[4], const unsigned right[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// sum (16, 8) += left (16, 8) @ right (8, 8), in TF32.
__device__ inline void multiply_tf32(float sum[4], const unsigned left[4], const unsigned right[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// A Right of bfloat16, from a matrix in shared memory. `row` is the address of the 8 elements of the matrix's row lane % 16.
__device__ inline void load_bfloat16(unsigned right[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(right[0]), "=r"(right[1])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}

// Two numbers, rounded to bfloat16. The first one is the lower half of the result.
__device__ inline unsigned round_to_bfloat16(float first, float second) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// A number, rounded to TF32, ties away from zero.
__device__ inline unsigned round_to_tf32(float x) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return rounded;
}

// 2^x, with an error of a few units of the last place. Results that would be subnormal are 0.
__device__ inline float fast_exp2(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// Begin to copy 16 bytes to shared memory: the first `count` from an address that is a multiple of 16, and then zeros.
__device__ inline void begin_to_copy(void* to, const void* from, int count) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "r"(count)
                 : "memory");
}

// The copies that a thread has begun since its last call are one batch.
__device__ inline void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most the last N batches of this thread are under way.
template <int N>
__device__ inline void wait_for_batches() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif

// ---------------------------------------------------------------- pairs of neighbouring elements

template <typename Element>
struct Pair;

template <>
struct Pair<bfloat16> {
    unsigned bits;

    Pair() = default;

    __device__ Pair(float first, float second) : bits(round_to_bfloat16(first, second)) {}

    __device__ float first() const { return __uint_as_float(bits << 16); }

    __device__ float second() const { return __uint_as_float(bits & 0xffff0000u); }
};

template <>
struct alignas(8) Pair<float> {
    float at[2];

    Pair() = default;

    __device__ Pair(float first, float second) : at{first, second} {}

    __device__ float first() const { return at[0]; }

    __device__ float second() const { return at[1]; }
};

// ---------------------------------------------------------------- matrices

struct Sum {
    float at[4];
};

struct Left {
    Pair<T> at[4];

    Left() = default;

    // Two Sums (16, 8) side by side, rounded.
    __device__ Left(const Sum& first, const Sum& second)
        : at{Pair<T>(first.at[0], first.at[1]), Pair<T>(first.at[2], first.at[3]), Pair<T>(second.at[0], second.at[1]),
             Pair<T>(second.at[2], second.at[3])} {}

    // The matrix whose first element is at `from`. Its rows are `stride` elements apart.
    __device__ Left(const T* from, int stride) {
        const T* mine = from + lane() / 4 * stride + lane() % 4 * 2;
        #pragma unroll
        for (int i = 0; i < 4; i++) at[i] = *(const Pair<T>*)(mine + i % 2 * 8 * stride + i / 2 * 8);
    }
};

struct Right {
    Pair<T> at[2];

    // The transpose of the matrix (8, 16) whose first element is at `from`.
    __device__ static Right transposed(const T* from, int stride) {
        const T* mine = from + lane() / 4 * stride + lane() % 4 * 2;
        return {*(const Pair<T>*)mine, *(const Pair<T>*)(mine + 8)};
    }
};

// The matrix (16, 8) whose first element is at `from`, in shared memory.
__device__ inline void load_right(Pair<bfloat16> right[2], const bfloat16* from, int stride) {
    unsigned bits[2];
    load_bfloat16(bits, from + lane() % 16 * stride);
    right[0].bits = bits[0];
    right[1].bits = bits[1];
}

__device__ inline void load_right(Pair<float> right[2], const float* from, int stride) {
    const float* mine = from + lane() % 4 * 2 * stride + lane() / 4;
    right[0] = Pair<float>(mine[0], mine[stride]);
    right[1] = Pair<float>(mine[8 * stride], mine[9 * stride]);
}

// ---------------------------------------------------------------- products

__device__ inline void multiply(Sum& sum, const Pair<bfloat16> left[4], const Pair<bfloat16> right[2]) {
    const unsigned left_bits[4] = {left[0].bits, left[1].bits, left[2].bits, left[3].bits};
    const unsigned right_bits[2] = {right[0].bits, right[1].bits};
    multiply_bfloat16(sum.at, left_bits, right_bits);
}

// Splits x into a number of TF32 and the rest. Products ignore the last 13 bits of both. If x is NaN, so is the rest.
__device__ inline unsigned split(float x, unsigned& rest) {
    unsigned near = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
    rest = __float_as_uint(x - __uint_as_float(near));
    return near;
}

// If EXACT, each number is the sum of two of TF32, and only the product of the two small ones is left out. Then the error is about
// that of float32.
__device__ inline void multiply(Sum& sum, const Pair<float> left[4], const Pair<float> right[2]) {
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const Pair<float>*l = left + 2 * half, *r = right + half;
        const float l_numbers[4] = {l[0].first(), l[1].first(), l[0].second(), l[1].second()};
        const float r_numbers[2] = {r->first(), r->second()};
        unsigned l_near[4], l_rest[4], r_near[2], r_rest[2];
        for (int i = 0; i < 4; i++) l_near[i] = EXACT ? split(l_numbers[i], l_rest[i]) : round_to_tf32(l_numbers[i]);
        for (int i = 0; i < 2; i++) r_near[i] = EXACT ? split(r_numbers[i], r_rest[i]) : round_to_tf32(r_numbers[i]);
        if (EXACT) {
            multiply_tf32(sum.at, l_rest, r_near);
            multiply_tf32(sum.at, l_near, r_rest);
        }
        multiply_tf32(sum.at, l_near, r_near);
    }
}
