// The kernels for x86 processors with AVX-512 and AVX512-BF16, with products of bfloat16.

#include <sched.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && (__GNUC__ >= 10 || __clang_major__ >= 9)
#include <immintrin.h>

#define PROCESSOR avx512bf16
#define BYTES 64
#define HAS_BFLOAT16
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
