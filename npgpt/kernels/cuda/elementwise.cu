// Elementwise kernels: bias, copies, GELU, rotary positions, dropout, clipping, AdamW. The formulas are those of reference.py and
// updates.py.

const double GELU_SCALE = 0.7978845608028654;  // sqrt(2 / pi)
const double GELU_CUBIC = 0.044715;

// y (n, c) += bias, in place. A thread works on one group.
extern "C" __global__ void add_bias(T* y, const A* bias, long long n, long long c) {
    long long groups = (c + GROUP - 1) / GROUP;
    for (long long i = thread_number(); i < n * groups; i += thread_count()) {
        long long row = i / groups, first = i % groups * GROUP;
        Group values, added;
        values.load(y + row * c + first, c - first);
        added.load(bias + first, c - first);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) values.at[j] += added.at[j];
        values.store(y + row * c + first, c - first);
    }
}

// y = x, or y += x, for views x and y of shape (b, h, t, d). Their first three axes have the strides xb, xh, xt and yb, yh, yt, in
// elements, and the last one has stride 1. A thread works on one group.
extern "C" __global__ void copy(
    const T* x, T* y, long long b, long long h, long long t, long long d, long long xb, long long xh, long long xt, long long yb,
    long long yh, long long yt, long long add) {
    long long groups = (d + GROUP - 1) / GROUP;
    for (long long i = thread_number(); i < b * h * t * groups; i += thread_count()) {
        long long row = i / groups, first = i % groups * GROUP, at_t = row % t, at_h = row / t % h, at_b = row / t / h;
        T* to = y + at_b * yb + at_h * yh + at_t * yt + first;
        Group values, before;
        values.load(x + at_b * xb + at_h * xh + at_t * xt + first, d - first);
        before.load(to, add ? d - first : 0);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) values.at[j] += before.at[j];
        values.store(to, d - first);
    }
}

// (1 + tanh(u)) / 2 for the u of GELU. This is the logistic function of 2 u, so one exponential is enough.
__device__ inline A gelu_factor(A v) { return 1 / (1 + fast_exp(-2 * (A)GELU_SCALE * (v + (A)GELU_CUBIC * v * v * v))); }

// A thread works on one group, here and in the backward pass.
extern "C" __global__ void gelu_forward(const T* x, T* y, long long n) {
    for (long long i = thread_number() * GROUP; i < n; i += thread_count() * GROUP) {
        Group values;
        values.load(x + i, n - i);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) values.at[j] *= gelu_factor(values.at[j]);
        values.store(y + i, n - i);
    }
}

// The factor f is computed again from x: that costs less than reading it from memory. (1 - tanh(u)^2) / 2 is 2 f (1 - f).
extern "C" __global__ void gelu_backward(const T* dy, const T* x, T* dx, long long n) {
    for (long long i = thread_number() * GROUP; i < n; i += thread_count() * GROUP) {
        Group values, gradient;
        values.load(x + i, n - i);
        gradient.load(dy + i, n - i);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) {
            A v = values.at[j], f = gelu_factor(v);
            A du_dx = (A)GELU_SCALE * (1 + 3 * (A)GELU_CUBIC * v * v);
            gradient.at[j] *= f + 2 * v * f * (1 - f) * du_dx;
        }
        gradient.store(dx + i, n - i);
    }
}

// x and y are (n, 2 half) and rotation is (positions, 2 half), in pairs; row r has position r / inner % positions. Each pair is
// turned by the pair (cos, sin) of its position; with direction -1, back again. A thread works on one pair.
extern "C" __global__ void rotary(
    const T* x, const A* rotation, T* y, long long n, long long half, long long inner, long long positions, double direction) {
    for (long long i = thread_number(); i < n * half; i += thread_count()) {
        const A* turn = rotation + 2 * (i / half / inner % positions * half + i % half);
        A cosine = turn[0], sine = (A)direction * turn[1], even = (A)x[2 * i], odd = (A)x[2 * i + 1];
        y[2 * i] = (T)(cosine * even - sine * odd);
        y[2 * i + 1] = (T)(sine * even + cosine * odd);
    }
}

// y = x * scale where the draw is at least the threshold, else 0. If `onto` is not null, it is added to y. All arrays are
// (n, c). The backward pass is the same kernel with dy for x, so the mask is never stored. A thread works on one group.
extern "C" __global__ void dropout(
    const T* x, const T* onto, T* y, long long n, long long c, const unsigned long long* key, long long use, long long threshold, double scale) {
    long long groups = (c + GROUP - 1) / GROUP;
    for (long long i = thread_number(); i < n * groups; i += thread_count()) {
        long long row = i / groups, first = i % groups * GROUP, at = row * c + first;
        Draws draws(key, use, row, i % groups);
        Group values, sum;
        values.load(x + at, c - first);
        if (onto) sum.load(onto + at, c - first);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) {
            A kept = draws[j] >= threshold ? values.at[j] * (A)scale : (A)0;
            sum.at[j] = onto ? sum.at[j] + kept : kept;
        }
        sum.store(y + at, c - first);
    }
}

// y (n, c) = the draws.
extern "C" __global__ void draw(unsigned short* y, long long n, long long c, const unsigned long long* key, long long use) {
    long long groups = (c + GROUP - 1) / GROUP;
    for (long long i = thread_number(); i < n * groups; i += thread_count()) {
        long long row = i / groups, first = i % groups * GROUP;
        Draws draws(key, use, row, i % groups);
        #pragma unroll
        for (int j = 0; j < GROUP; j++)
            if (first + j < c) y[row * c + first + j] = (unsigned short)draws[j];
    }
}

// Each warp writes the sum of the squares of its elements to partial.
extern "C" __global__ void sum_of_squares(const A* x, A* partial, long long n) {
    A sum = 0;
    for (long long i = thread_number(); i < n; i += thread_count()) sum += x[i] * x[i];
    sum = warp_sum(sum);
    if (lane() == 0) partial[row_of_warp()] = sum;
}

// The grid is one warp. It adds up the n partial sums; the square root is the gradient's norm. It writes to scale the factor that makes the norm
// at most max_norm; or -1 if the loss or the norm is not finite, or scale was negative already. It writes (loss, norm) to seen.
extern "C" __global__ void clip_factor(const A* partial, long long n, const A* loss, double max_norm, A* scale, A* seen) {
    A sum = 0;
    for (long long i = lane(); i < n; i += WARP) sum += partial[i];
    A norm = sqrt(warp_sum(sum));
    if (lane()) return;
    bool finite = norm - norm == 0 && *loss - *loss == 0;
    *scale = *scale < 0 || !finite ? (A)-1 : norm > (A)max_norm ? (A)max_norm / norm : (A)1;
    seen[0] = *loss;
    seen[1] = norm;
}

// correction1 and correction2 are 1 - beta^step. Weight decay acts on the first n_decay elements. If scale is not null, it
// multiplies the gradient. A negative scale means: change nothing.
extern "C" __global__ void adamw(
    A* parameter, const A* gradient, A* exp_avg, A* exp_avg_sq, const A* scale, long long n, long long n_decay,
    double lr, double beta1, double beta2, double correction1, double correction2, double eps, double weight_decay) {
    if (scale && *scale < 0) return;
    for (long long i = thread_number(); i < n; i += thread_count()) {
        A g = scale ? gradient[i] * *scale : gradient[i];
        A m = (A)beta1 * exp_avg[i] + (A)(1 - beta1) * g;
        A v = (A)beta2 * exp_avg_sq[i] + (A)(1 - beta2) * g * g;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        A denominator = sqrt(v / (A)correction2) + (A)eps;
        A kept = i < n_decay ? (A)(1 - lr * weight_decay) : (A)1;
        parameter[i] = parameter[i] * kept - (A)(lr / correction1) * m / denominator;
    }
}
