// Softmax, fused with the operations around it: in the cross-entropy, and in causal attention where attention.cu does not apply.

// p = softmax(scale * scores) over the keys a query may see. If kept is not null, kept = dropout(p). scores, p and kept are
// (n, n_key), one row for each query. Row r belongs to query r % n_query; the queries are the last n_query of n_key
// positions. p may be the same array as scores.
extern "C" __global__ void causal_softmax_forward(
    const T* scores, T* p, T* kept, long long n, long long n_query, long long n_key, double scale, const unsigned long long* key,
    long long use, long long threshold, double kept_scale) {
    long long row = row_of_warp();
    if (row >= n) return;
    long long seen = n_key - n_query + row % n_query + 1;
    scores += row * n_key;
    A top = (A)scale * (A)scores[0], total = 0;
    Group values, dropped;
    for (long long first = lane() * GROUP; first < seen; first += WARP * GROUP) {
        values.load(scores + first, n_key - first);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) {
            A score = (A)scale * values.at[j];
            top = first + j < seen && score > top ? score : top;
        }
    }
    top = warp_max(top);
    if (top < 0 && top - top != 0) top = 0;  // all scores are -inf: the probabilities become 0, and not NaN
    for (long long first = lane() * GROUP; first < seen; first += WARP * GROUP) {
        values.load(scores + first, n_key - first);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) total += first + j < seen ? fast_exp((A)scale * values.at[j] - top) : (A)0;
    }
    total = warp_sum(total);
    A factor = total > 0 ? 1 / total : total;
    for (long long first = lane() * GROUP; first < n_key; first += WARP * GROUP) {
        long long count = n_key - first;
        values.load(scores + first, first < seen ? count : 0);
        #pragma unroll
        for (int j = 0; j < GROUP; j++)  // rounded to T, as the backward pass will read it
            values.at[j] = first + j < seen ? (A)(T)(fast_exp((A)scale * values.at[j] - top) * factor) : (A)0;
        values.store(p + row * n_key + first, count);
        if (!kept) continue;
        Draws draws(first < seen ? key : nullptr, use, row, first / GROUP);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) dropped.at[j] = draws[j] >= threshold ? values.at[j] * (A)kept_scale : (A)0;
        dropped.store(kept + row * n_key + first, count);
    }
}

// Input: dkept, the gradient of kept. Output: dscores, the gradient of scores. With threshold 0 there was no dropout. dscores may be
// the same array as dkept.
extern "C" __global__ void causal_softmax_backward(
    const T* dkept, const T* p, T* dscores, long long n, long long n_query, long long n_key, double scale,
    const unsigned long long* key, long long use, long long threshold, double kept_scale) {
    long long row = row_of_warp();
    if (row >= n) return;
    long long seen = n_key - n_query + row % n_query + 1;
    dkept += row * n_key;
    p += row * n_key;
    dscores += row * n_key;
    A sum = 0;
    Group gradient, values;
    for (long long first = lane() * GROUP; first < seen; first += WARP * GROUP) {
        Draws draws(key, use, row, first / GROUP);
        gradient.load(dkept + first, n_key - first);
        values.load(p + first, n_key - first);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) {
            A dp = first + j < seen && draws[j] >= threshold ? gradient.at[j] * (A)kept_scale : (A)0;
            gradient.at[j] = dp;
            sum += dp * values.at[j];
        }
        gradient.store(dscores + first, n_key - first);  // this thread reads it again
    }
    sum = warp_sum(sum);
    for (long long first = lane() * GROUP; first < n_key; first += WARP * GROUP) {
        gradient.load(dscores + first, first < seen ? n_key - first : 0);
        values.load(p + first, first < seen ? n_key - first : 0);
        #pragma unroll
        for (int j = 0; j < GROUP; j++)
            gradient.at[j] = first + j < seen ? values.at[j] * (gradient.at[j] - sum) * (A)scale : (A)0;
        gradient.store(dscores + first, n_key - first);
    }
}

// losses[row] = log(sum(exp(logits[row]))) - logits[row, target], with logits (n, v), whose rows are `stride` elements apart. The
// backward pass needs the two parts of that logarithm: the largest logit, and log(sum(exp(logits - largest))).
extern "C" __global__ void cross_entropy_forward(
    const T* logits, const long long* targets, A* losses, A* largest, A* log_total, long long n, long long v, long long stride) {
    long long row = row_of_warp();
    if (row >= n) return;
    logits += row * stride;
    A top = (A)logits[0], total = 0;
    Group values;
    for (long long first = lane() * GROUP; first < v; first += WARP * GROUP) {
        values.load(logits + first, v - first);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) top = first + j < v && values.at[j] > top ? values.at[j] : top;
    }
    top = warp_max(top);
    for (long long first = lane() * GROUP; first < v; first += WARP * GROUP) {
        values.load(logits + first, v - first);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) total += first + j < v ? exp(values.at[j] - top) : (A)0;
    }
    total = log(warp_sum(total));
    if (lane() == 0) {
        largest[row] = top;
        log_total[row] = total;
        losses[row] = total - ((A)logits[targets[row]] - top);
    }
}

// dlogits = dy (p - onehot(target)), contiguous.
extern "C" __global__ void cross_entropy_backward(
    const A* dy, const T* logits, const long long* targets, const A* largest, const A* log_total, T* dlogits, long long n,
    long long v, long long stride) {
    long long row = row_of_warp();
    if (row >= n) return;
    logits += row * stride;
    dlogits += row * v;
    A d = dy[row], top = largest[row], log_sum = log_total[row];
    Group values;
    for (long long first = lane() * GROUP; first < v; first += WARP * GROUP) {
        values.load(logits + first, v - first);
        #pragma unroll
        for (int j = 0; j < GROUP; j++)
            values.at[j] = d * (exp(values.at[j] - top - log_sum) - (first + j == targets[row] ? (A)1 : (A)0));
        values.store(dlogits + first, v - first);
    }
}
