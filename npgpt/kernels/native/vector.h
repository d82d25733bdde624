// What all kernels share: vectors of floats, and the exponential. A vector has as many bytes as the processor's registers; the
// files processors_*.c set BYTES and include all kernels once for each kind of processor.
//
// Vectors are those of GCC and Clang, so the same sources serve x86 and ARM. No option that lets the compiler change the order of
// sums or ignore infinities and NaN is used: a loss that is not finite stays so.

#define LANES (BYTES / 4)
#define UNROLL _Pragma("GCC unroll 16")  // before a short loop whose arrays are to be in registers

typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t ivec __attribute__((vector_size(BYTES)));
typedef float in_memory __attribute__((vector_size(BYTES), aligned(4), may_alias));

static inline vec splat(float value) { return value - (vec){0}; }

static inline vec load(const float *from) { return *(const in_memory *)from; }

static inline void store(float *to, vec value) { *(in_memory *)to = value; }

static inline vec where(ivec condition, vec yes, vec no) { return (vec)((condition & (ivec)yes) | (~condition & (ivec)no)); }

// The last elements of a row: the first n < LANES of a vector. Nothing past them is read or written.
#if BYTES == 64
static inline vec load_first(const float *from, int64_t n, float rest) {
    return (vec)_mm512_mask_loadu_ps((__m512)splat(rest), (__mmask16)((1u << n) - 1), from);
}

static inline void store_first(float *to, int64_t n, vec value) {
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1), (__m512)value);
}
#elif BYTES == 32
static inline ivec is_first(int64_t n) { return (ivec){0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)n; }

static inline vec load_first(const float *from, int64_t n, float rest) {
    return where(is_first(n), (vec)_mm256_maskload_ps(from, (__m256i)is_first(n)), splat(rest));
}

static inline void store_first(float *to, int64_t n, vec value) {
    _mm256_maskstore_ps(to, (__m256i)is_first(n), (__m256)value);
}
#else
static inline vec load_first(const float *from, int64_t n, float rest) {
    vec value = splat(rest);
    for (int i = 0; i < n; i++) value[i] = from[i];
    return value;
}

static inline void store_first(float *to, int64_t n, vec value) {
    for (int i = 0; i < n; i++) to[i] = value[i];
}
#endif

// A vector of a row of which n elements are left. `rest` takes the place of elements past the end.
static inline vec load_some(const float *from, int64_t n, float rest) {
    return n >= LANES ? load(from) : load_first(from, n, rest);
}

static inline void store_some(float *to, int64_t n, vec value) {
    if (n >= LANES)
        store(to, value);
    else
        store_first(to, n, value);
}

// The larger elements; b where one is NaN.
static inline vec larger(vec a, vec b) { return where(a > b, a, b); }

static inline float sum_of(vec value) {
#if BYTES == 64
    return _mm512_reduce_add_ps((__m512)value);
#else
    float half[LANES];
    memcpy(half, &value, sizeof half);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) half[i] += half[i + n];
    return half[0];
#endif
}

static inline float largest_of(vec value) {
#if BYTES == 64
    return _mm512_reduce_max_ps((__m512)value);
#else
    float result = value[0];
    for (int i = 1; i < LANES; i++) result = value[i] > result ? value[i] : result;
    return result;
#endif
}

// 2^k for -126 <= k <= 127.
static inline vec power_of_two(ivec k) { return (vec)((k + 127) << 23); }

// e^x, to within one unit in the last place, also where the result is denormal; 0 below, infinity above, NaN for NaN.
//
// e^x = 2^k e^r with k = round(x / log 2), so |r| <= log(2) / 2 (Cody and Waite, 1980: log 2 in two parts, so that r is exact).
// The polynomial for e^r is that of Cephes (Moshier). 2^k is applied in two steps, because 2^k itself may be out of range.
static inline vec exponential(vec x) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: a float of this size has no fraction
    x = where(x < splat(-104.0f), splat(-104.0f), x);
    x = where(x > splat(89.0f), splat(89.0f), x);
    vec shifted = x * 1.44269504f + to_integer, k = shifted - to_integer;
    vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ivec whole = (ivec)shifted - (ivec)splat(to_integer), half = whole >> 1;
    return p * power_of_two(half) * power_of_two(whole - half);
}
