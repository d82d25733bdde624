// Element by element: GELU, dropout, AdamW. The formulas are those of reference.py.

const double GELU_SCALE = 0.7978845608028654;  // sqrt(2 / pi)
const double GELU_CUBIC = 0.044715;

extern "C" __global__ void gelu_forward(const T* x, T* y, long long n) {
    for (long long i = thread_number(); i < n; i += thread_count()) {
        A v = (A)x[i];
        y[i] = (T)((A)0.5 * v * (1 + tanh((A)GELU_SCALE * (v + (A)GELU_CUBIC * v * v * v))));
    }
}

// From x once more: a tanh costs less than reading it from memory.
extern "C" __global__ void gelu_backward(const T* dy, const T* x, T* dx, long long n) {
    for (long long i = thread_number(); i < n; i += thread_count()) {
        A v = (A)x[i];
        A t = tanh((A)GELU_SCALE * (v + (A)GELU_CUBIC * v * v * v));
        A du_dx = (A)GELU_SCALE * (1 + 3 * (A)GELU_CUBIC * v * v);
        dx[i] = (T)((A)dy[i] * ((A)0.5 * (1 + t) + (A)0.5 * v * (1 - t * t) * du_dx));
    }
}

// y = x * scale where the draw reaches the threshold, else 0; x and y are (n, c). The way back is the same with dy: the mask
// is never stored. A thread takes a group of a row.
extern "C" __global__ void dropout(
    const T* x, T* y, long long n, long long c, unsigned long long key, long long use, long long threshold, double scale) {
    long long groups = (c + GROUP - 1) / GROUP;
    for (long long i = thread_number(); i < n * groups; i += thread_count()) {
        long long row = i / groups, first = i % groups * GROUP;
        Draws draws(key, use, row, i % groups);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) {
            if (first + j >= c) break;
            long long at = row * c + first + j;
            y[at] = draws[j] >= threshold ? (T)((A)x[at] * (A)scale) : (T)0;
        }
    }
}

// The draws themselves, (n, c).
extern "C" __global__ void draw(unsigned short* y, long long n, long long c, unsigned long long key, long long use) {
    long long groups = (c + GROUP - 1) / GROUP;
    for (long long i = thread_number(); i < n * groups; i += thread_count()) {
        long long row = i / groups, first = i % groups * GROUP;
        Draws draws(key, use, row, i % groups);
        #pragma unroll
        for (int j = 0; j < GROUP; j++)
            if (first + j < c) y[row * c + first + j] = (unsigned short)draws[j];
    }
}

// correction1 and correction2 are 1 - beta^step.
extern "C" __global__ void adamw(
    T* parameter, const T* gradient, T* exp_avg, T* exp_avg_sq, long long n, double lr, double beta1, double beta2,
    double correction1, double correction2, double eps, double weight_decay) {
    for (long long i = thread_number(); i < n; i += thread_count()) {
        A g = (A)gradient[i];
        A m = (A)beta1 * (A)exp_avg[i] + (A)(1 - beta1) * g;
        A v = (A)beta2 * (A)exp_avg_sq[i] + (A)(1 - beta2) * g * g;
        exp_avg[i] = (T)m;
        exp_avg_sq[i] = (T)v;
        A denominator = sqrt(v / (A)correction2) + (A)eps;
        parameter[i] = (T)((A)parameter[i] * (A)(1 - lr * weight_decay) - (A)(lr / correction1) * m / denominator);
    }
}
