// Runs blocks of CUDA threads on a CPU, one after the other, so that the results of kernels can be compared with the reference.
//
// Each thread of a block is a coroutine. Where CUDA's threads wait for each other (a shuffle, __syncthreads, a product on tensor
// cores), a coroutine switches to the next one. Wrong indices and formulas give wrong results here; races go unnoticed. The sources
// of the kernels follow.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

using std::exp;
using std::log;
using std::sqrt;

#define __device__
#define __expf(value) std::exp(value)  // CUDA's fast approximation; the C library has an __expf of its own
#define __global__
#define __launch_bounds__(threads, blocks)
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

static void __threadfence() {}

static unsigned atomicAdd(unsigned* address, unsigned value) {
    unsigned before = *address;
    *address += value;
    return before;
}

// Warps may come here after different numbers of shuffles.
static unsigned arrived, barriers;

static void __syncthreads() {
    unsigned before = barriers;
    if (++arrived == blockDim.x) {
        arrived = 0;
        barriers++;
    }
    while (barriers == before) wait_for_the_others();
}

template <typename Value>
static Value value_of(Value value, unsigned thread) {
    exchanged[threadIdx.x] = value;
    wait_for_the_others();
    Value other = (Value)exchanged[thread];
    wait_for_the_others();  // all threads must have read before one writes again
    return other;
}

template <typename Value>
static Value __shfl_xor_sync(unsigned, Value value, int distance) {
    return value_of(value, threadIdx.x ^ distance);
}

template <typename Value>
static Value __shfl_sync(unsigned, Value value, int lane) {
    return value_of(value, threadIdx.x - threadIdx.x % 32 + lane);
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

// ---------------------------------------------------------------- tensor cores
//
// What "PTX ISA" says of mma and ldmatrix: which thread of a warp holds which elements of a matrix.

#define EMULATED_TENSOR_CORES

struct Registers {
    unsigned left[4], right[2];
};
static std::vector<Registers> registers;

// sum (16, 8) += left (16, k) @ right (k, 8). left_at(registers of a thread, i, k) and right_at(registers of a thread, k) find the
// elements of row group + 8 i and of column group in the registers of the thread that holds them.
template <typename LeftAt, typename RightAt>
static void multiply(float sum[4], const unsigned left[4], const unsigned right[2], int size, LeftAt left_at, RightAt right_at) {
    unsigned me = threadIdx.x, first = me - me % 32, group = me % 32 / 4;
    registers[me] = {{left[0], left[1], left[2], left[3]}, {right[0], right[1]}};
    wait_for_the_others();
    for (int j = 0; j < 4; j++)
        for (int k = 0; k < size; k++) {
            unsigned column = me % 4 * 2 + j % 2;
            sum[j] += left_at(&registers[first + group * 4], j / 2, k) * right_at(&registers[first + column * 4], k);
        }
    wait_for_the_others();
}

static float half_of(unsigned bits, int upper) { return __uint_as_float(upper ? bits & 0xffff0000u : bits << 16); }

static void multiply_bfloat16(float sum[4], const unsigned left[4], const unsigned right[2]) {
    auto left_at = [](Registers* group, int i, int k) { return half_of(group[k % 8 / 2].left[i + k / 8 * 2], k % 2); };
    auto right_at = [](Registers* group, int k) { return half_of(group[k % 8 / 2].right[k / 8], k % 2); };
    multiply(sum, left, right, 16, left_at, right_at);
}

static float in_tf32(unsigned bits) { return __uint_as_float(bits & 0xffffe000u); }

static void multiply_tf32(float sum[4], const unsigned left[4], const unsigned right[2]) {
    auto left_at = [](Registers* group, int i, int k) { return in_tf32(group[k % 4].left[i + k / 4 * 2]); };
    auto right_at = [](Registers* group, int k) { return in_tf32(group[k % 4].right[k / 4]); };
    multiply(sum, left, right, 8, left_at, right_at);
}

static std::vector<const unsigned short*> rows;

static void load_bfloat16(unsigned right[2], const void* row) {
    unsigned me = threadIdx.x, first = me - me % 32, group = me % 32 / 4, column = me % 4 * 2;
    rows[me] = (const unsigned short*)row;
    wait_for_the_others();
    for (int i = 0; i < 2; i++) {
        const unsigned short **from = &rows[first + 8 * i + column];
        right[i] = from[0][group] | (unsigned)from[1][group] << 16;
    }
    wait_for_the_others();
}

static unsigned round_to_bfloat16(float first, float second) {
    unsigned bits[2] = {__float_as_uint(first), __float_as_uint(second)};
    for (unsigned& all : bits) {
        bool nan = (all & 0x7fffffffu) > 0x7f800000u;
        all = nan ? 0x7fffu : (all + 0x7fffu + (all >> 16 & 1u)) >> 16;
    }
    return bits[0] | bits[1] << 16;
}

static unsigned round_to_tf32(float x) {
    unsigned bits = __float_as_uint(x);
    bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
    return (is_finite ? bits + 0x1000u : bits) & 0xffffe000u;
}

static float fast_exp2(float x) { return std::exp2(x); }

// A copy happens when its thread waits for it, which is as late as it can be. Where the addresses are no multiples of 16, a GPU
// stops with an error; here the copy is NaN.
struct Copy {
    void* to;
    const void* from;
    int count;
};
static std::vector<std::deque<std::vector<Copy>>> batches;  // of each thread; the last one is open

static void begin_to_copy(void* to, const void* from, int count) {
    batches[threadIdx.x].back().push_back({to, from, count});
}

static void end_batch() { batches[threadIdx.x].emplace_back(); }

template <int N>
static void wait_for_batches() {
    auto& mine = batches[threadIdx.x];
    for (; mine.size() > N + 1; mine.pop_front())
        for (const Copy& copy : mine.front()) {
            bool are_aligned = (size_t)copy.to % 16 == 0 && (copy.count == 0 || (size_t)copy.from % 16 == 0);
            std::memset(copy.to, are_aligned ? 0 : 0xff, 16);
            if (are_aligned) std::memcpy(copy.to, copy.from, copy.count);
        }
}

// ---------------------------------------------------------------- threads and blocks

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
    registers.assign(block, {});
    rows.assign(block, nullptr);
    batches.assign(block, {{}});
    arrived = 0;
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
