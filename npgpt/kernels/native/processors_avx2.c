// The kernels for x86 processors with AVX2 and FMA.

#include <sched.h>
#include <stdint.h>
#include <string.h>

#ifdef __x86_64__
#include <immintrin.h>

#define PROCESSOR avx2
#define BYTES 32
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
