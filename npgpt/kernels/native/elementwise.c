// GELU, dropout with the residual sum, AdamW. The formulas are those of reference.py and updates.py.

#define GELU_SCALE 0.7978845608028654f  // sqrt(2 / pi)
#define GELU_CUBIC 0.044715f

// (1 + tanh(u)) / 2 for the u of GELU. This is the logistic function of 2 u, so one exponential is enough.
static inline vec gelu_factor(vec x, vec square) {
    return 1.0f / (1.0f + exponential(x * (square * (-2 * GELU_SCALE * GELU_CUBIC) - 2 * GELU_SCALE)));
}

void NAME(gelu_forward)(const float *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = load_some(x + i, n - i, 0);
        store_some(y + i, n - i, v * gelu_factor(v, v * v));
    }
}

// The factor f is computed again: that costs less than reading it from memory. (1 - tanh(u)^2) / 2 is 2 f (1 - f).
void NAME(gelu_backward)(const float *dy, const float *x, float *dx, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = load_some(x + i, n - i, 0), square = v * v, f = gelu_factor(v, square);
        vec du_dx = square * (3 * GELU_SCALE * GELU_CUBIC) + GELU_SCALE;
        vec slope = f + 2.0f * v * f * (1.0f - f) * du_dx;
        // f (1 - f) is 0 for an x so large that its square is infinite. The slope is then f, not 0 times infinity.
        slope = where(square > splat(1e4f), f + (v - v), slope);
        store_some(dx + i, n - i, load_some(dy + i, n - i, 0) * slope);
    }
}

// y = x * scale where the draw is at least the threshold, else 0; plus onto, if it is not null. The backward pass is the same with
// dy for x.
void NAME(dropout)(
    const float *x, const float *onto, const uint16_t *draws, float *y, int64_t n, int64_t threshold, double scale) {
    const int limit = threshold;
    const float factor = scale;
    if (onto)
        for (int64_t i = 0; i < n; i++) y[i] = onto[i] + (draws[i] >= limit ? x[i] * factor : 0.0f);
    else
        for (int64_t i = 0; i < n; i++) y[i] = draws[i] >= limit ? x[i] * factor : 0.0f;
}

typedef struct {
    float keep1, add1, keep2, add2, step_size, part2, tiny;
} AdamWNumbers;

static inline void adamw_part(
    float *parameter, const float *gradient, float *exp_avg, float *exp_avg_sq, int64_t from, int64_t to, float decay,
    AdamWNumbers a) {
    for (int64_t i = from; i < to; i++) {
        float g = gradient[i], m = a.keep1 * exp_avg[i] + a.add1 * g, v = a.keep2 * exp_avg_sq[i] + a.add2 * (g * g);
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        parameter[i] = parameter[i] * decay - a.step_size * m / (__builtin_sqrtf(v * a.part2) + a.tiny);
    }
}

// correction1 and correction2 are 1 - beta^step. Weight decay acts on the first n_decay elements.
void NAME(adamw)(
    float *parameter, const float *gradient, float *exp_avg, float *exp_avg_sq, int64_t n, int64_t n_decay, double lr,
    double beta1, double beta2, double correction1, double correction2, double eps, double weight_decay) {
    AdamWNumbers a = {beta1, 1 - beta1, beta2, 1 - beta2, lr / correction1, 1 / correction2, eps};
    adamw_part(parameter, gradient, exp_avg, exp_avg_sq, 0, n_decay, 1 - lr * weight_decay, a);
    adamw_part(parameter, gradient, exp_avg, exp_avg_sq, n_decay, n, 1, a);
}
