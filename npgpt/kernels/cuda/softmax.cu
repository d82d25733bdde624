// Softmax, fused with the operations around it: in causal attention and in the cross-entropy.

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
    p += row * n_key;
    A top = (A)scale * (A)scores[0], total = 0;
    for (long long i = lane(); i < seen; i += WARP) {
        A score = (A)scale * (A)scores[i];
        top = score > top ? score : top;
    }
    top = warp_max(top);
    for (long long i = lane(); i < seen; i += WARP) total += exp((A)scale * (A)scores[i] - top);
    total = warp_sum(total);
    for (long long i = lane(); i < n_key; i += WARP)
        p[i] = i < seen ? (T)(exp((A)scale * (A)scores[i] - top) / total) : (T)0;
    if (!kept) return;
    kept += row * n_key;
    __syncwarp();  // the next loop reads what other threads of the warp wrote
    for (long long group = lane(); group * GROUP < n_key; group += WARP) {
        Draws draws(key, use, row, group);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) {
            long long i = group * GROUP + j;
            if (i >= n_key) break;
            kept[i] = draws[j] >= threshold ? (T)((A)p[i] * (A)kept_scale) : (T)0;
        }
    }
}

// Input: dkept, the gradient of kept. Output: dscores, the gradient of scores. With threshold 0 there was no dropout. dscores may be the same array as dkept.
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
    for (long long group = lane(); group * GROUP < n_key; group += WARP) {
        Draws draws(key, use, row, group);
        #pragma unroll
        for (int j = 0; j < GROUP; j++) {
            long long i = group * GROUP + j;
            if (i >= n_key) break;
            A dp = i < seen && draws[j] >= threshold ? (A)dkept[i] * (A)kept_scale : (A)0;
            dscores[i] = (T)dp;
            sum += dp * (A)p[i];
        }
    }
    sum = warp_sum(sum);
    __syncwarp();
    for (long long i = lane(); i < n_key; i += WARP)
        dscores[i] = i < seen ? (T)((A)p[i] * ((A)dscores[i] - sum) * (A)scale) : (T)0;
}

// losses[row] = log(sum(exp(logits[row]))) - logits[row, target], with logits (n, v). The backward pass needs the two parts of
// that logarithm: the largest logit, and log(sum(exp(logits - largest))).
extern "C" __global__ void cross_entropy_forward(
    const T* logits, const long long* targets, A* losses, A* largest, A* log_total, long long n, long long v) {
    long long row = row_of_warp();
    if (row >= n) return;
    logits += row * v;
    A top = (A)logits[0], total = 0;
    for (long long i = lane(); i < v; i += WARP) top = (A)logits[i] > top ? (A)logits[i] : top;
    top = warp_max(top);
    for (long long i = lane(); i < v; i += WARP) total += exp((A)logits[i] - top);
    total = log(warp_sum(total));
    if (lane() == 0) {
        largest[row] = top;
        log_total[row] = total;
        losses[row] = total - ((A)logits[targets[row]] - top);
    }
}

// dlogits = dy (p - onehot(target)).
extern "C" __global__ void cross_entropy_backward(
    const A* dy, const T* logits, const long long* targets, const A* largest, const A* log_total, T* dlogits, long long n,
    long long v) {
    long long row = row_of_warp();
    if (row >= n) return;
    logits += row * v;
    dlogits += row * v;
    for (long long i = lane(); i < v; i += WARP) {
        A p = exp((A)logits[i] - largest[row] - log_total[row]);
        dlogits[i] = (T)(dy[row] * (p - (i == targets[row] ? (A)1 : (A)0)));
    }
}
