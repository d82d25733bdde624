// Runs blocks of CUDA threads on a CPU, one after the other, so that the results of kernels can be compared with the reference.
//
// Each thread of a block is a coroutine. Where CUDA's threads wait for each other (a shuffle, __syncwarp), a coroutine switches
// to the next one. Wrong indices and formulas give wrong results here; races go unnoticed. The sources of the kernels follow.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

using std::exp;
using std::log;
using std::sqrt;
using std::tanh;

#define __device__
#define __expf(value) std::exp(value)  // CUDA's fast approximation; the C library has an __expf of its own
#define __global__
#define __shared__ static  // there is only one block at a time

static unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

// A coroutine starts with ucontext.h and switches with _longjmp. swapcontext is slower, because it makes a system call.
struct Thread {
    ucontext_t start;
    jmp_buf at;
    std::vector<char> stack;
    bool started, done;
};
static std::vector<Thread> threads;
static jmp_buf scheduler;
static std::vector<double> exchanged;
static std::function<void()> body;

static void wait_for_the_others() {
    unsigned me = threadIdx.x;
    if (!_setjmp(threads[me].at)) _longjmp(scheduler, 1);
}

static void __syncwarp() { wait_for_the_others(); }

static void __syncthreads() { wait_for_the_others(); }

template <typename Value>
static Value __shfl_xor_sync(unsigned, Value value, int distance) {
    unsigned me = threadIdx.x;
    exchanged[me] = value;
    wait_for_the_others();
    Value other = (Value)exchanged[me ^ distance];
    wait_for_the_others();  // all threads must have read before one writes again
    return other;
}

static unsigned __ballot_sync(unsigned, bool condition) {
    unsigned me = threadIdx.x, first = me - me % 32, bits = 0;
    exchanged[me] = condition;
    wait_for_the_others();
    for (unsigned i = 0; i < 32; i++) bits |= (unsigned)(exchanged[first + i] != 0) << i;
    wait_for_the_others();
    return bits;
}

static int __ffs(int value) { return __builtin_ffs(value); }

static void thread_main() {
    for (;;) {  // each pass is this thread's part of one block
        body();
        threads[threadIdx.x].done = true;
        wait_for_the_others();
    }
}

static void go_on_with(int i) {
    threadIdx = {(unsigned)i, 0, 0};
    if (_setjmp(scheduler)) return;
    if (threads[i].started) _longjmp(threads[i].at, 1);
    threads[i].started = true;
    setcontext(&threads[i].start);
}

static void make_threads(int n) {
    threads = std::vector<Thread>(n);
    for (auto& thread : threads) {
        thread.stack.resize(64 << 10);
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.data();
        thread.start.uc_stack.ss_size = thread.stack.size();
        makecontext(&thread.start, thread_main, 0);
    }
}

template <typename Call>
static void run(int grid_x, int grid_y, int block, Call call) {
    if ((int)threads.size() != block) make_threads(block);
    body = call;
    gridDim = {(unsigned)grid_x, (unsigned)grid_y, 1};
    blockDim = {(unsigned)block, 1, 1};
    exchanged.assign(block, 0.0);
    for (unsigned y = 0; y < gridDim.y; y++)
        for (unsigned x = 0; x < gridDim.x; x++) {
            blockIdx = {x, y, 0};
            for (auto& thread : threads) thread.done = false;
            for (bool all_done = false; !all_done;) {
                all_done = true;
                for (int i = 0; i < block; i++)
                    if (!threads[i].done) {
                        all_done = false;
                        go_on_with(i);
                    }
            }
        }
}
