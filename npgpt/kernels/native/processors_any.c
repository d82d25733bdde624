// The kernels for any processor, and the choice among those that were built.

#include <sched.h>
#include <stdint.h>
#include <string.h>

#define PROCESSOR any
#define BYTES 16
#include "kernels.h"

// The name of the best kernels for this processor.
const char *best_processor(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
#if __GNUC__ >= 10 || __clang_major__ >= 9
        return __builtin_cpu_supports("avx512bf16") ? "avx512bf16" : "avx512";
#else
        return "avx512";
#endif
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
    return "any";
}

// The hash of the sources that this library was built from; see library.py.
const char *sources(void) { return SOURCES; }
