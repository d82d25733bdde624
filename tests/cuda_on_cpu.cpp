// Runs a block of CUDA threads on a CPU, one after the other: enough to compare what a kernel computes with the reference.
//
// Each thread of a block is a coroutine; where CUDA's threads wait for each other (a shuffle, __syncwarp) each hands on to the
// next. So wrong indices and wrong formulas show, and races do not. The kernels' sources are included after this file.

#include <ucontext.h>

#include <cmath>
#include <functional>
#include <vector>

using std::exp;
using std::log;
using std::sqrt;
using std::tanh;

#define __device__
#define __global__

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static std::vector<double> exchanged;
static std::function<void()> body;

static void wait_for_the_others() {
    unsigned me = threadIdx.x;
    swapcontext(&threads[me].context, &scheduler);
    threadIdx.x = me;
}

static void __syncwarp() { wait_for_the_others(); }

template <typename Value>
static Value __shfl_xor_sync(unsigned, Value value, int distance) {
    unsigned me = threadIdx.x;
    exchanged[me] = value;
    wait_for_the_others();
    Value other = (Value)exchanged[me ^ distance];
    wait_for_the_others();  // before the place is written again
    return other;
}

static void thread_main() {
    body();
    threads[threadIdx.x].done = true;
}

template <typename Call>
static void run(int grid_x, int grid_y, int block, Call call) {
    body = call;
    gridDim = {(unsigned)grid_x, (unsigned)grid_y, 1};
    blockDim = {(unsigned)block, 1, 1};
    exchanged.assign(block, 0.0);
    threads.resize(block);
    for (int y = 0; y < grid_y; y++)
        for (int x = 0; x < grid_x; x++) {
            blockIdx = {(unsigned)x, (unsigned)y, 0};
            for (auto& thread : threads) {
                thread.stack.resize(64 << 10);
                thread.done = false;
                getcontext(&thread.context);
                thread.context.uc_stack.ss_sp = thread.stack.data();
                thread.context.uc_stack.ss_size = thread.stack.size();
                thread.context.uc_link = &scheduler;
                makecontext(&thread.context, thread_main, 0);
            }
            for (bool all_done = false; !all_done;) {
                all_done = true;
                for (int i = 0; i < block; i++)
                    if (!threads[i].done) {
                        all_done = false;
                        threadIdx = {(unsigned)i, 0, 0};
                        swapcontext(&scheduler, &threads[i].context);
                    }
            }
        }
}
