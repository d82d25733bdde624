"""`make mutation`: check that the tests catch bugs. Each bug is planted in a copy of the package, and the tests are run.

    python tests/studies/mutation.py [NAME ...]

Each bug is a small change to a backward pass, to code it relies on, to a tokenizer or to a file format: a dropped sum, a
wrong axis, a sign, a missing factor, a mask off by one, a forgotten term. A bug is caught if a test fails. The script prints the number of planted and
caught bugs and the names of the survivors. The exit status is 1 if a bug survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TESTS = ["engine/test_gradients.py", "engine/test_properties.py", "engine/test_tensor.py", "kernels/test_cpu.py", "model"]
TESTS += ["training/test_muon.py"]
DRAWING_TESTS = ["model", "generation"]
PAGE_TESTS = ["report", "serving"]
GPU_TESTS = ["kernels/test_cuda.py", "kernels/test_products.py", "engine/test_device.py", "training/test_device.py"]
GPU_TESTS += ["parallel/test_recorded.py"]
REFERENCE, CPU = "kernels/reference.py", "kernels/cpu.py"
GRAPH, TENSOR, OPS = "engine/graph.py", "engine/tensor.py", "engine/ops.py"
GPT, LAYERS, CACHE, MUON = "model/gpt.py", "model/layers.py", "model/cache.py", "training/muon.py"
PAGE, INSIDE_PAGE, INSIDE_JS = "report/page.py", "report/inside_page.py", "report/assets/inside.js"
PROTECTION, BATCHING, APP, RUN = "serving/protection.py", "serving/batching.py", "serving/app.py", "storage/run.py"
INSIDE, SIDE_BY_SIDE, SAMPLING = "model/inside.py", "generation/side_by_side.py", "generation/sampling.py"
NORM, ELEMENTWISE, SOFTMAX = "kernels/cuda/norm.cu", "kernels/cuda/elementwise.cu", "kernels/cuda/softmax.cu"
EMBEDDING, COMMON = "kernels/cuda/embedding.cu", "kernels/cuda/common.cu"
SUMS, OPERANDS = "kernels/cuda/sums.cu", "kernels/cuda/operands.py"
FUSED, TILES, TENSOR_CORES = (f"kernels/cuda/{name}.cu" for name in ("attention", "tiles", "tensor_cores"))
CUDA, CUDA_ATTENTION = "kernels/cuda/kernels.py", "kernels/cuda/attention.py"
PRODUCTS, RECORDED = "kernels/cuda/products.py", "parallel/recorded.py"

BPE, DESCRIPTION, READING, RECORD, RESIZE = (
    "text/bpe.py",
    "text/bpe_description.py",
    "text/reading.py",
    "text/record.py",
    "model/resize.py",
)
LOSS, COMPARISON, JUDGED = "evaluation/loss.py", "evaluation/comparison.py", "evaluation/judged_text.py"
ARCHITECTURES, HUGGING_FACE = "exchange/architectures.py", "exchange/huggingface.py"
SAFETENSORS, WEIGHTS, GGUF = "exchange/safetensors.py", "exchange/weights.py", "exchange/gguf.py"
TEXT_TESTS = ["text", "exchange", "evaluation", "model/test_resize.py", "commands/test_tokenizers.py"]

OF_TEXTS = {BPE, DESCRIPTION, READING, RECORD, RESIZE, LOSS, COMPARISON, JUDGED}  # TEXT_TESTS cover these files
OF_TEXTS |= {ARCHITECTURES, HUGGING_FACE, SAFETENSORS, WEIGHTS, GGUF}
OF_DRAWING = {CACHE, INSIDE, SIDE_BY_SIDE, SAMPLING}  # DRAWING_TESTS cover these files
OF_PAGES = {PAGE, INSIDE_PAGE, INSIDE_JS, PROTECTION, BATCHING, APP, RUN}  # PAGE_TESTS cover these files
OF_A_GPU = {NORM, ELEMENTWISE, SOFTMAX, EMBEDDING, COMMON, FUSED, TILES, TENSOR_CORES}  # GPU_TESTS cover these files
OF_A_GPU |= {CUDA, CUDA_ATTENTION, PRODUCTS, OPERANDS, SUMS, RECORDED}

VECTOR, C_ELEMENTWISE, C_NORM = (f"kernels/native/{name}" for name in ("vector.h", "elementwise.c", "norm.c"))
C_SOFTMAX, C_PRODUCT, C_ATTENTION, C_DECODE = (
    f"kernels/native/{name}.c" for name in ("softmax", "product", "attention", "decode")
)
NATIVE, LIBRARY, TEAM = (f"kernels/native/{name}.py" for name in ("kernels", "library", "team"))
OF_NATIVE = {
    VECTOR,
    C_ELEMENTWISE,
    C_NORM,
    C_SOFTMAX,
    C_PRODUCT,
    C_ATTENTION,
    C_DECODE,
    NATIVE,
    LIBRARY,
    TEAM,
}  # NATIVE_TESTS cover these files
NATIVE_TESTS = ["kernels/test_cpu.py", "kernels/test_native.py", "kernels/test_team.py", "model/test_decode.py"]

RANKS, NCCL, STEP, TRAIN = "parallel/ranks.py", "parallel/nccl.py", "parallel/step.py", "commands/train.py"
CHECKS, TRAINER = "training/checks.py", "training/trainer.py"
OF_RANKS = {RANKS, NCCL, STEP, TRAIN, CHECKS, TRAINER}  # RANK_TESTS cover these files
RANK_TESTS = ["parallel/test_ranks.py"]

# (name, file, text that occurs once in the file, text that replaces it).
BUGS = [
    ("linear: dx by the weight, not its transpose", REFERENCE, "dy @ weight.T", "dy @ weight"),
    ("linear: dweight without the last row", REFERENCE, "added(rows.T @ dy,", "added(rows[:-1].T @ dy[:-1],"),
    ("linear: dweight halved", REFERENCE, "added(rows.T @ dy,", "added(0.5 * rows.T @ dy,"),
    ("linear: dbias averaged", REFERENCE, "added(dy.sum(axis=0),", "added(dy.mean(axis=0),"),
    ("linear: dbias of the first row", REFERENCE, "added(dy.sum(axis=0),", "added(dy[0],"),
    ("linear: dx and dweight mixed up in needs", REFERENCE, "if needs[1] else None", "if needs[0] else None"),
    ("softmax: row term forgotten", REFERENCE, "p * (dy - (dy * p).sum(axis=axis, keepdims=True))", "p * dy"),
    ("softmax: row term added", REFERENCE, "p * (dy - (dy * p)", "p * (dy + (dy * p)"),
    ("softmax: row term over the wrong axis", REFERENCE, "(dy * p).sum(axis=axis,", "(dy * p).sum(axis=0,"),
    ("softmax: row term without p", REFERENCE, "(dy * p).sum(axis=axis", "dy.sum(axis=axis"),
    ("softmax: p forgotten", REFERENCE, "return p * (dy -", "return (dy -"),
    ("masked fill: the gradient passes the mask", REFERENCE, "self.xp.where(mask, self.xp.zeros((), dtype=dy.dtype), dy)", "dy"),
    ("masked fill: mask the wrong way round", REFERENCE, "where(mask, self.xp.zeros", "where(~mask, self.xp.zeros"),
    ("dropout: no scale on the way back", REFERENCE, "return dy * scaled_mask", "return dy * (scaled_mask > 0)"),
    ("dropout: no mask on the way back", REFERENCE, "return dy * scaled_mask", "return dy * scaled_mask.max()"),
    ("dropout: scale by p", REFERENCE, "1 / (1 - p) if p < 1", "1 / p if p < 1"),
    ("attention: scale forgotten on the way back", REFERENCE, "self.softmax_backward(dp, saved_softmax) * scale", "self.softmax_backward(dp, saved_softmax)"),
    ("attention: dropout forgotten on the way back", REFERENCE, "dp = self.dropout_backward(dp, saved_dropout)", "pass"),
    ("attention: dk from k", REFERENCE, "dscores.swapaxes(-1, -2) @ q", "dscores.swapaxes(-1, -2) @ k[..., : q.shape[-2], :]"),
    ("attention: dv from undropped probabilities", REFERENCE, "dv = p.swapaxes(-1, -2) @ dy", "dv = saved_softmax[0].swapaxes(-1, -2) @ dy"),
    ("attention: sees one token of the future", REFERENCE, "xp.arange(n_key) > xp.arange", "xp.arange(n_key) > 1 + xp.arange"),
    ("attention: does not see itself", REFERENCE, "xp.arange(n_key) > xp.arange", "xp.arange(n_key) >= xp.arange"),
    ("layer norm: mean term forgotten", REFERENCE, "rstd * (g - mean_g - xhat * mean_g_xhat)", "rstd * (g - xhat * mean_g_xhat)"),
    ("layer norm: variance term forgotten", REFERENCE, "rstd * (g - mean_g - xhat * mean_g_xhat)", "rstd * (g - mean_g)"),
    ("layer norm: rstd forgotten", REFERENCE, "rstd * (g - mean_g", "(g - mean_g"),
    ("layer norm: weight forgotten in g", REFERENCE, "g = dy * weight\n        mean_g ", "g = dy\n        mean_g "),
    ("layer norm: dweight without xhat", REFERENCE, "(dy * xhat).sum(", "dy.sum("),
    ("layer norm: eps outside the root", REFERENCE, "1 / self.xp.sqrt(variance + x.dtype.type(eps))", "1 / (self.xp.sqrt(variance) + x.dtype.type(eps))"),
    ("layer norm: unbiased variance", REFERENCE, "(centred * centred).mean(axis=-1, keepdims=True)", "(centred * centred).sum(axis=-1, keepdims=True) / max(1, x.shape[-1] - 1)"),
    ("gelu: derivative of u forgotten", REFERENCE, "(1 - t * t) * du_dx)", "(1 - t * t))"),
    ("gelu: cubic term without its 3", REFERENCE, "1 + 3 * GELU_CUBIC", "1 + GELU_CUBIC"),
    ("gelu: second term forgotten", REFERENCE, "dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du_dx)", "dy * (0.5 * (1 + t))"),
    ("gelu: 1 - t for 1 - t^2", REFERENCE, "(1 - t * t) * du_dx", "(1 - t) * du_dx"),
    ("relu: the gradient passes everywhere", REFERENCE, "return dy * positive", "return dy * 1.0"),
    ("relu: leaks", REFERENCE, "return dy * positive", "return dy * (0.99 * positive + 0.01)"),
    ("embedding: repeated ids overwrite", REFERENCE, "self.xp.add.at(dweight, ids, dy)", "dweight[ids] = dy"),
    ("embedding: ids off by one", REFERENCE, "self.xp.add.at(dweight, ids, dy)", "self.xp.add.at(dweight, ids - 1, dy)"),
    ("cross-entropy: target forgotten", REFERENCE, "dlogits -= onehot * dy[..., None]", "pass"),
    ("cross-entropy: target without dy", REFERENCE, "dlogits -= onehot * dy[..., None]", "dlogits -= onehot"),
    ("cross-entropy: dy forgotten", REFERENCE, "dlogits = p * dy[..., None]", "dlogits = p * 1.0"),
    ("cross-entropy: softmax not normalised", REFERENCE, "p /= total\n        at_target", "at_target"),
    ("cpu attention: scale forgotten in dq", CPU, "np.multiply(ds @ k[:, :, :seen], scale, out=dq[:, :, rows])", "dq[:, :, rows] = ds @ k[:, :, :seen]"),
    ("cpu attention: row term forgotten", CPU, "ds -= row_term[:, :, rows]", "pass"),
    ("cpu attention: row term forgotten under dropout", CPU, "ds -= e\n", "pass\n"),
    ("cpu attention: row term without the kept share", CPU, " * factor * q.dtype.type(keep)", " * factor"),
    ("cpu attention: dk of the last block alone", CPU, "dk[:, :, :seen] += dk_part", "dk[:, :, :seen] = dk_part"),
    ("cpu attention: dv of the last block alone", CPU, "dv[:, :, :seen] += dv_part", "dv[:, :, :seen] = dv_part"),
    ("cpu attention: mask off by one", CPU, "corner *= np.tri(n_rows, dtype=scores.dtype)", "corner *= np.tri(n_rows, k=-1, dtype=scores.dtype) + np.eye(n_rows, k=1, dtype=scores.dtype)"),
    ("cpu attention: mask off by one, large scores", CPU, "where=~np.tri(n_rows, dtype=bool)", "where=~np.tri(n_rows, k=1, dtype=bool)"),
    ("cpu attention: overflow not avoided", CPU, "scores -= scores.max(axis=-1, keepdims=True)", "pass"),
    ("cpu attention: dv from undropped exponentials", CPU, "dv_part = kept.swapaxes(-1, -2)", "dv_part = e.swapaxes(-1, -2)"),
    ("cpu attention: factor forgotten in g", CPU, "g = np.multiply(dy, factor, out", "g = np.multiply(dy, 1.0, out"),
    ("cpu layer norm: mean term forgotten", CPU, "dx[s] -= (dy[s] @ weight_mean)[:, None]", "pass"),
    ("cpu layer norm: variance term forgotten", CPU, "dx[s] -= product", "pass"),
    ("cpu layer norm: dweight of the last block alone", CPU, "dweight += _column_sums(product)", "dweight[...] = _column_sums(product)"),
    ("cpu layer norm: dbias of the last block alone", CPU, "dbias += _column_sums(dy[s])", "dbias[...] = _column_sums(dy[s])"),
    ("cpu layer norm: mean over the wrong count", CPU, "weight_mean = weight / c", "weight_mean = weight / (c - 1)"),
    ("cpu layer norm: rstd forgotten", CPU, "dx[s] *= rstd[s]", "pass"),
    ("cpu gelu: slope of the cubic term", CPU, "square *= 6 * GELU_SCALE * GELU_CUBIC", "square *= 2 * GELU_SCALE * GELU_CUBIC"),
    ("cpu gelu: slope without g", CPU, "slopes += g", "pass"),
    ("cpu gelu: slope without 1 - g", CPU, "np.subtract(1, g, out=slopes)", "slopes[...] = 1"),
    ("cpu embedding: repeated ids count once", CPU, "np.add.reduceat(_as_rows(dy)[order], starts, axis=0)", "_as_rows(dy)[order][starts]"),
    ("cpu embedding: unsorted gradients", CPU, "_as_rows(dy)[order]", "_as_rows(dy)"),
    ("tensor: subtraction without its sign", TENSOR, "lambda dy: dy, lambda dy: -dy", "lambda dy: dy, lambda dy: dy"),
    ("tensor: product by the wrong side", TENSOR, "lambda dy: dy * b_data, lambda dy: dy * a_data", "lambda dy: dy * a_data, lambda dy: dy * b_data"),
    ("tensor: quotient's second gradient without its sign", TENSOR, "lambda dy: -dy * y / b_data", "lambda dy: dy * y / b_data"),
    ("tensor: number over tensor", TENSOR, "(-dy * y / a_data,)", "(-dy / a_data,)"),
    ("tensor: power without its factor", TENSOR, "dy * (b_data * a_data ** (b_data - 1) if", "dy * (a_data ** (b_data - 1) if"),
    ("tensor: tensor power without the logarithm", TENSOR, "dy * y * xp.log(xp.where(a_data == 0, 1, a_data))", "dy * y"),
    ("tensor: power of a number without the logarithm", TENSOR, "(dy * y * log,)", "(dy * y,)"),
    ("tensor: matmul without a transpose", TENSOR, "lambda dy: a_data.swapaxes(-1, -2) @ dy", "lambda dy: a_data @ dy"),
    ("tensor: log", TENSOR, "(dy / x,)", "(dy * x,)"),
    ("tensor: tanh with y for y^2", TENSOR, "dy * (1 - y * y)", "dy * (1 - y)"),
    ("tensor: sqrt without its half", TENSOR, "dy * 0.5 / y", "dy / y"),
    ("tensor: mean without 1/N", TENSOR, "return total / (self.size // max(total.size, 1))", "return total * 1.0"),
    ("tensor: sum to the wrong places", TENSOR, "dy.reshape(kept), shape)", "dy.reshape(kept)[..., :1], shape)"),
    ("tensor: transpose not undone", TENSOR, "(dy.transpose(back),)", "(dy.transpose(order),)"),
    ("tensor: repeated index counts once", TENSOR, "xp.add.at(dx, index, dy)", "dx[index] = dy"),
    ("graph: a slice's gradient replaces the others", REFERENCE, "total[index] += values\n", "total[index] = values\n"),
    ("graph: a borrowed gradient is written to", GRAPH, "self._gradients[node] = backend_of(dx.values).xp.array(self._gradients[node])", "pass"),
    ("graph: the second use is forgotten", GRAPH, "kernels.add(before, dx) if", "kernels.add(before, 0 * dx) if"),
    ("graph: the third use is forgotten", GRAPH, "            self._gradients[node] += _unbroadcast(dx, node)", "            pass"),
    ("graph: a leaf's gradients do not add up", GRAPH, "leaf.grad += gradient", "leaf.grad[...] = gradient"),
    ("graph: a leaf shares its gradient", GRAPH, "leaf.grad = backend_of(leaf.data).xp.array(gradient)", "leaf.grad = gradient"),
    ("graph: broadcasting undone by picking, leading axes", GRAPH, "gradient.sum(axis=tuple(range(extra))) if extra", "gradient[(0,) * extra] if extra"),
    ("graph: broadcasting undone by averaging", GRAPH, "gradient.sum(axis=stretched, keepdims=True)", "gradient.mean(axis=stretched, keepdims=True)"),
    ("graph: shallow nodes first", GRAPH, "(-node.depth, self._found, node)", "(node.depth, self._found, node)"),
    ("graph: the gradient keeps a wider dtype", GRAPH, "return gradient if gradient.dtype == source.dtype else gradient.astype(source.dtype)", "return gradient"),
    ("graph: the graph is not freed", GRAPH, "node.inputs, node.backward = (), _used_up", "pass"),
    ("ops: mean loss without 1/N", OPS, 'losses.mean() if reduction == "mean"', 'losses.sum() if reduction == "mean"'),
    ("ops: a bias's gradient is dropped", OPS, "bias is not None and bias.requires_grad)", "False)"),
    ("cuda: layer norm without its mean", NORM, "sum += part.at[i].at[j];", "sum += 0;"),
    ("cuda: layer norm adds eps twice", NORM, "+ eps);\n        #pragma", "+ 2 * eps);\n        #pragma"),
    ("cuda: layer norm's mean term forgotten", NORM, "gradient.at[i].at[j] - mean_g - part", "gradient.at[i].at[j] - part"),
    ("cuda: layer norm's variance term without xhat", NORM, "part.at[i].at[j] * mean_g_xhat", "mean_g_xhat"),
    ("cuda: layer norm's dweight without rstd", NORM, "mean[row]) * rstd[row]", "mean[row])"),
    ("cuda: layer norm leaves out the last row of a chunk", NORM, "last = first + chunk < n ? first + chunk : n;", "last = first + chunk < n ? first + chunk - 1 : n;"),
    ("cuda: layer norm never adds the bias", NORM, "factors.at[j] + added.at[j]", "factors.at[j]"),
    ("cuda: layer norm's variance counts what is past the end", NORM, "ThreadColumns<N>::first(i) < c ? value * value : (A)0", "value * value"),
    ("cuda: the last partial sum forgotten", SUMS, "for (int i = 1; i < warps; i++)", "for (int i = 1; i < warps - 1; i++)"),
    ("rotary: turned the wrong way", REFERENCE, "even - sin * odd", "even + sin * odd"),
    ("rotary: the gradient is not turned back", REFERENCE, "rotation[..., 0::2], -rotation[..., 1::2])", "rotation[..., 0::2], rotation[..., 1::2])"),
    ("rotary: odd elements without their own cosine", REFERENCE, "sin * even + cos * odd", "sin * even + odd"),
    ("cpu rotary: the gradient is not turned back", CPU, "_as_complex(rotation).conj())", "_as_complex(rotation))"),
    ("rotary: keys are not turned", GPT, "qk[:, :, 1], qkv[:, :, 2])", "qkv[:, :, 1], qkv[:, :, 2])"),
    ("rotary: decoding forgets the position", GPT, "self.rotary.decode(qkv[:, :2], cache.positions)", "self.rotary.decode(qkv[:, :2], 0)"),
    ("rotary: all planes turn equally fast", LAYERS, "self.base ** (-np.arange(0, self._head_dim, 2) / self._head_dim)", "np.ones(self._head_dim // 2)"),
    ("cache: the newest token replaces the wrong one", CACHE, "self.positions % self._room if n == 1", "self._room - 1 - self.positions % self._room if n == 1"),
    ("cache: a shorter sequence sees what is not there", CACHE, "np.arange(present.max()) >= present[:, None]", "np.arange(present.max()) > present[:, None]"),
    ("cache: a sequence of its own length is stored in the wrong place", CACHE, "rows, at = np.arange(len(self.lengths)), self.positions % self._room", "rows, at = np.arange(len(self.lengths)), (self.positions - 1) % self._room"),
    ("cache: a removed sequence stays", CACHE, "lengths[row] = lengths[last]", "pass"),
    ("cache: the sequence that takes a place loses its last token", CACHE, "longest = min(int(lengths[last]), self._room)", "longest = min(int(lengths[last]), self._room) - 1"),
    ("rotary: every sequence at the first one's position", LAYERS, "for position in positions.tolist()", "for position in positions.tolist()[:1] * len(positions)"),
    ("inside: attention not scaled", GPT, "3, 2)) * self._scale", "3, 2))"),
    ("inside: attention sees the next token", GPT, "dtype=bool), 1)", "dtype=bool), 2)"),
    ("inside: queries of a residual without its norm", INSIDE, "module.ln_1(self._residual[block])", "self._residual[block]"),
    ("side by side: a close draw is not decided again", SIDE_BY_SIDE, "np.flatnonzero(is_close & may_differ).tolist()", "[]"),
    ("side by side: samples share a stream", SIDE_BY_SIDE, "Stream.SAMPLE, sample)", "Stream.SAMPLE, 0)"),
    ("sampling: a draw close to the upper bound counts as clear", SAMPLING, "weights[rows, ids], cumulative[rows, ids]):", "weights[rows, ids],):"),
    ("sampling: equal likeliest ids count as clear", SAMPLING, "<= 2 * tolerance\n", "< 0\n"),
    ("sampling: ids close to the k-th count as clear", SAMPLING, "(logits <= following + reach)", "(logits < following)"),
    ("sampling: neighbours at the limit of top-p count as clear", SAMPLING, "first, end = first - 1, first + 1", "return slice(0, 0)"),
    ("sampling: ids at the limit of min-p count as clear", SAMPLING, "<= error[:, None] * least", "< 0"),
    ("pages: text is not escaped", PAGE, "html.escape(SURROGATE", "str(SURROGATE"),
    ("pages: data can end its element", PAGE, 'for sign in "<>&":', 'for sign in "&":'),
    ("pages: every script may run", PAGE, "script-src {hashes}", "script-src 'unsafe-inline'"),
    ("pages: surprisal of the wrong position", INSIDE_PAGE, "slice(start, len(ids) - 1)", "slice(start + 1, len(ids))"),
    ("pages: small weights of attention vanish", INSIDE_PAGE, "255 * np.sqrt(attention[:", "255 * (attention[:"),
    ("pages: what top-p drops still counts", INSIDE_JS, "if (kept) keptTotal += p;", "keptTotal += p;"),
    ("pages: the temperature acts before top-k and not after", INSIDE_JS, "Math.exp((logit - largest) / t)", "Math.exp(logit - largest)"),
    ("pages: a resumed run begins at time 0", RUN, "before = seconds\n", "before = 0.0\n"),
    ("server: a host that begins like an allowed one", PROTECTION, "_name_of(host[0]) not in self._hosts", "not _name_of(host[0]).startswith(tuple(self._hosts))"),
    ("server: pages of other servers are let in", PROTECTION, "!= host[0].lower()", "== b'?'"),
    ("server: the beginning of a key is enough", PROTECTION, "hmac.compare_digest(key.strip(), self._api_key)", "self._api_key.startswith(key.strip()[:3])"),
    ("server: a body of any size", PROTECTION, "if self._n > LARGEST_BODY:", "if self._n > 50 * LARGEST_BODY:"),
    ("server: a cancelled text is drawn to its end", BATCHING, "place.job.is_cancelled or place.job.error", "place.job.error"),
    ("server: the queue has no bound", BATCHING, "> self._longest_queue + free", "> 10**9"),
    ("server: stop texts are forgotten", BATCHING, "StopFinder(job.stop,", "StopFinder((),"),
    ("server: tokens of a stop text are shown", BATCHING, "self.held[0][1] <= self.n_shown", "True"),
    ("server: the second text of a request is the first", BATCHING, "job.settings.seed, number, job", "job.settings.seed, 0, job"),
    ("server: echo forgets the first token", APP, "[(ids[0], None, ()), *rows]", "rows"),
    ("muon: no momentum", MUON, "mean *= mu\n", "mean *= 0\n"),
    ("muon: no look ahead", MUON, "orthogonalised((1 - mu) * gradient + mu * mean)", "orthogonalised(mean)"),
    ("muon: the shape of a matrix forgotten", MUON, "weight -= (self.muon_lr * shape_scale) * update", "weight -= self.muon_lr * update"),
    ("muon: no weight decay", MUON, "weight *= 1 - self.muon_lr * self.weight_decay", "pass"),
    ("muon: q, k and v as one matrix", MUON, "width * i // parts for i in range(parts + 1)", "width * i for i in range(2)"),
    ("muon: the cubic term with the wrong sign", MUON, "gram *= b", "gram *= -b"),
    ("muon: AdamW decays no embedding", MUON, "flat.n_decay - at.start", "flat.n_decay - at.stop"),
    ("muon: a negative scale moves the mean", MUON, "xp.where(scale < 0, mean, new_mean)", "new_mean"),
    ("cuda: rotary's gradient is not turned back", CUDA, "self._rotary(dy, saved, -1.0)", "self._rotary(dy, saved, 1.0)"),
    ("cuda: rotary with the wrong positions", ELEMENTWISE, "i / half / inner % positions", "i / half % positions"),
    ("cuda: gelu's cubic term without its 3", ELEMENTWISE, "1 + 3 * (A)GELU_CUBIC", "1 + (A)GELU_CUBIC"),
    ("cuda: gelu's second term forgotten", ELEMENTWISE, "f + 2 * v * f * (1 - f) * du_dx", "f"),
    ("cuda: dropout's threshold halved", ELEMENTWISE, "draws[j] >= threshold ? values", "draws[j] >= threshold / 2 ? values"),
    ("cuda: dropout without scale", ELEMENTWISE, "values.at[j] * (A)scale : (A)0", "values.at[j] : (A)0"),
    ("cuda: AdamW without a correction", ELEMENTWISE, "sqrt(v / (A)correction2)", "sqrt(v)"),
    ("cuda: AdamW's decay without the learning rate", ELEMENTWISE, "(1 - lr * weight_decay)", "(1 - weight_decay)"),
    ("cuda: softmax sees one token of the future", SOFTMAX, "row % n_query + 1;\n    scores", "row % n_query + 2;\n    scores"),
    ("cuda: softmax does not subtract its largest score", SOFTMAX, "top = first + j < seen && score > top ? score : top;", "top = 0;"),
    ("cuda: softmax's sum sees the future", SOFTMAX, "total += first + j < seen ? fast_exp", "total += first + j < n_key ? fast_exp"),
    ("cuda: softmax's row term forgotten", SOFTMAX, "(gradient.at[j] - sum)", "(gradient.at[j])"),
    ("cuda: softmax's scale forgotten on the way back", SOFTMAX, "- sum) * (A)scale :", "- sum) :"),
    ("cuda: attention's dropout without scale on the way back", SOFTMAX, "gradient.at[j] * (A)kept_scale", "gradient.at[j]"),
    ("cuda: probabilities of the future are not cleared", SOFTMAX, "values.store(p + row * n_key + first, count);", "values.store(p + row * n_key + first, first < seen ? count : 0);"),
    ("cuda: other dropout draws in the backward pass", SOFTMAX, "dscores += row * n_key;\n    A sum = 0;", "dscores += row * n_key;\n    use++;\n    A sum = 0;"),
    ("cuda: cross-entropy's target forgotten", SOFTMAX, " - (first + j == targets[row] ? (A)1 : (A)0)", ""),
    ("cuda: cross-entropy's gradient of the loss forgotten", SOFTMAX, "A d = dy[row], top", "A d = 1, top"),
    ("cuda: embedding without its last row", EMBEDDING, "row < last; row++", "row < last - 1; row++"),
    ("cuda: embedding's table of sums not cleared", EMBEDDING, "table[id * c] = 0", "table[id * c] += 0"),
    ("cuda: the residual sum forgotten", ELEMENTWISE, "onto ? sum.at[j] + kept : kept", "kept"),
    ("cuda: the first column's bias for all columns", ELEMENTWISE, "added.load(bias + first, c - first);", "added.load(bias, c);"),
    ("cuda: a copy reads the heads backwards", ELEMENTWISE, "x + at_b * xb + at_h * xh", "x + at_b * xb + (h - 1 - at_h) * xh"),
    ("cuda: a sum into a slice replaces it", ELEMENTWISE, "values.at[j] += before.at[j];", ";"),
    ("cuda: a bias's gradient without its last row", SUMS, "first + chunk : n, start", "first + chunk : n - 1, start"),
    ("cuda: the norm uses the first 32 partial sums only", ELEMENTWISE, "i = lane(); i < n; i += WARP) sum += partial", "i = lane(); i < WARP; i += WARP) sum += partial"),
    ("cuda: clipping to twice the norm", ELEMENTWISE, "(A)max_norm / norm", "2 * (A)max_norm / norm"),
    ("cuda: training continues after a step that is not finite", ELEMENTWISE, "*scale < 0 || !finite", "!finite"),
    ("cuda: a loss that is not finite goes unnoticed", ELEMENTWISE, "norm - norm == 0 && *loss - *loss == 0", "norm - norm == 0"),
    ("cuda: everything decays", ELEMENTWISE, "i < n_decay ? (A)(1", "true ? (A)(1"),
    ("cuda: AdamW's scale forgotten", ELEMENTWISE, "scale ? gradient[i] * *scale : gradient[i]", "gradient[i]"),
    ("cuda: AdamW continues after a step that is not finite", ELEMENTWISE, "if (scale && *scale < 0) return;", ""),
    ("bfloat16: cut off, not rounded", COMMON, "(all + 0x7fffu + (all >> 16 & 1u)) >> 16", "all >> 16"),
    ("bfloat16: ties away from zero", COMMON, "0x7fffu + (all >> 16 & 1u)", "0x8000u"),
    ("bfloat16: NaN becomes an infinity", COMMON, "nan ? all >> 16 | 0x40u :", "false ? 0 :"),
    ("product: the wrong distance between rows", OPERANDS, "Operand(x, False, by_row if rows > 1 else columns, stride)", "Operand(x, False, columns, stride)"),
    ("product: a transposed operand read as it lies", OPERANDS, "Operand(x, True,", "Operand(x, False,"),
    ("product: the first matrix of a batch for all", OPERANDS, "return axes[-1][1]", "return 0"),
    ("product: two strides taken for one", OPERANDS, "if outer != n * inner:", "if False:"),
    ("cuda linear: dweight in the dtype of the activations", CUDA, "self._product(rows.T, dy, dtype, onto[0])", "self._product(rows.T, dy, None, onto[0])"),
    ("cuda linear: dx by the weight, not its transpose", CUDA, "self._product(dy, weight.T)", "self._product(dy, weight.reshape(weight.shape[::-1]))"),
    ("cuda attention: dk and dv mixed up", CUDA_ATTENTION, "self._product(ds.swapaxes(-1, -2), q), dv", "dv, self._product(ds.swapaxes(-1, -2), q)"),
    ("residual: the gradient does not reach the stream", REFERENCE, "return dy, self.dropout_backward(dy, saved)", "return 0 * dy, self.dropout_backward(dy, saved)"),
    ("residual: the branch's gradient not thinned out", REFERENCE, "return dy, self.dropout_backward(dy, saved)", "return dy, dy"),
    ("astype: the gradient stays in the other dtype", TENSOR, "lambda dy: (dy.astype(before),)", "lambda dy: (0 * dy.astype(before),)"),
    ("cuda: one random number for two elements", COMMON, "16 * (i % 2)", "0"),
    ("cuda: the last element of a row is not read", COMMON, "j < count ? (A)from[j]", "j < count - 1 ? (A)from[j]"),
    ("cuda: the last element of a row is not written", COMMON, "if (j < count) to[j]", "if (j < count - 1) to[j]"),
    ("recorded: every replay draws the same masks", RECORDED, "self._keys[...] = backend.asarray(np.concatenate(keys))", "pass"),
    ("recorded: every replay sees the first batch", RECORDED, "self._x[...], self._y[...] = backend.asarray(x), backend.asarray(y)", "self._y[...] = backend.asarray(y)"),
    ("recorded: a replay overwrites an earlier loss", RECORDED, "return loss.copy()", "return loss"),
    ("recorded: a recording goes on with old weights", RECORDED, "is_same = flat.data is self._weights and flat.grad is self._gradient", "is_same = True"),
    ("recorded: one key for all micro-batches", RECORDED, "self._keys[i : i + 1]", "self._keys[:1]"),
    ("cuda: long rows of layer norm without their variance term", NORM, "- ((A)values[i] - m) * r * mean_g_xhat", ""),
    ("cuda: long rows of layer norm lose a row's gradient", NORM, "for (long long row = first; row < last; row++) {", "for (long long row = first + 1; row < last; row++) {"),
    ("cuda: a wide layer norm writes only its first groups", NORM, "if (first(i) < c) at[i].store_whole", "if (i < 2 && first(i) < c) at[i].store_whole"),
    ("cuda: layer norm's dbias for the first columns only", NORM, "partial[c + i * BLOCK_COLUMNS + column] =", "partial[c + column] ="),
    ("cuda: the last block adds up one chunk less", SUMS, "sums.add_up(partial, 0, gridDim.y,", "sums.add_up(partial, 0, gridDim.y - 1,"),
    ("cuda: the count of blocks is not cleared", SUMS, "if (last) arrived[blockIdx.x] = 0;", ""),
    ("cuda: a sum of columns forgets the gradient before", SUMS, "(add ? y[start + column] : (A)0)", "0"),
    ("cuda: warps left out of a sum of columns", SUMS, "for (int w = 1; w < warps; w++)", "for (int w = 1; w < 1; w++)"),
    ("cuda attention: a query sees one key of the future", FUSED, "bool is_future = start + 8 * n + column + j % 2 > past", "bool is_future = start + 8 * n + column + j % 2 > 1 + past"),
    ("cuda attention: old sums keep their factor", FUSED, "                sums[n].at[2 * i] *= factor;\n", ""),
    ("cuda attention: the total keeps its factor", FUSED, "            total[i] *= factor;\n", ""),
    ("cuda attention: the largest score of one thread", FUSED, "new_top[i] = max_of_four(new_top[i]);", ""),
    ("cuda attention: the total of one thread", FUSED, "total[i] = sum_of_four(total[i]);", ""),
    ("cuda attention: dropout without scale", FUSED, "sees_something ? (A)kept_scale / total[i]", "sees_something ? 1 / total[i]"),
    ("cuda attention: nothing is dropped", FUSED, "p = kept[j / 2] & (1 << j % 2) ? p : 0;", ""),
    ("cuda attention: the mask of the wrong row", FUSED, "query + lane() % 16, first_key", "query + lane() / 16, first_key"),
    ("cuda attention: the mask of the wrong keys", FUSED, "first_key / (int)GROUP + lane() / 16", "first_key / (int)GROUP + 1 - lane() / 16"),
    ("cuda attention: every head reads the first one", FUSED, "+ head % heads_of_a_row * HEAD_DIM", ""),
    ("cuda attention: every sequence reads the first one", FUSED, "(long long)(head / heads_of_a_row) * n * stride +", ""),
    ("cuda attention: columns past head_dim are not cleared", TILES, "count < 0 ? 0 : count < SIZE ? count : SIZE", "SIZE"),
    ("cuda attention: the row term forgotten", FUSED, "keeping : 0) - row_term[j / 2])", "keeping : 0))"),
    ("cuda attention: dq sees the future", FUSED, "dscores[half].at[j] = is_future ? 0 : dscores[half].at[j];", ""),
    ("cuda attention: dq without scale", FUSED, "const A factors[2] = {(A)scale, (A)scale};", "const A factors[2] = {1, 1};"),
    ("cuda attention: dk without scale", FUSED, "factors[2] = {(A)scale, (A)scale}, ones", "factors[2] = {1, 1}, ones"),
    ("cuda attention: dv without dropout", FUSED, "kept_p[half].at[j] = bit ? p[half].at[j] * keeping : 0;", "kept_p[half].at[j] = p[half].at[j];"),
    ("cuda attention: dk without dropout", FUSED, "kept >> (4 * half + j) & 1 ? dscores[half].at[j] * keeping : 0", "dscores[half].at[j]"),
    ("cuda attention: dk's row term forgotten", FUSED, "(dp - terms[buffer / 2][of_tile])", "dp"),
    ("cuda attention: dk sees the future", FUSED, "> past + start + of_tile ? 0 : p[half].at[j]", "> past + start + of_tile + 1 ? 0 : p[half].at[j]"),
    ("cuda attention: the second part of the columns is the first", FUSED, "multiply_columns<COLUMNS / 8>(sums, left, keys, 16 * c, place.part * COLUMNS)", "multiply_columns<COLUMNS / 8>(sums, left, keys, 16 * c, 0)"),
    ("cuda attention: the next tiles overwrite these", TILES, "load_tile(tiles[2 - buffer], a,", "load_tile(tiles[buffer], a,"),
    ("tensor cores: the rest of a number forgotten", TENSOR_CORES, "        if (EXACT) {", "        if (false) {"),
    ("tensor cores: two columns exchanged", TENSOR_CORES, "round_to_bfloat16(first, second))", "round_to_bfloat16(second, first))"),
    ("tensor cores: the lower rows read as the upper", TENSOR_CORES, "i % 2 * 8 * stride + i / 2 * 8", "i / 2 * 8"),
    ("cuda attention: rows of heads where there are none", CUDA_ATTENTION, "(by_head == head_dim or h == 1)", "True"),
    ("cuda attention: sequences that overlap", CUDA_ATTENTION, " and (by_batch == n * stride or b == 1) else 0", " else 0"),
    ("cuda attention: a gradient taken for contiguous", CUDA_ATTENTION, "dy = dy if dy.swapaxes(1, 2).flags.c_contiguous else self._in_rows_of_heads(dy)", ""),
    ("tensor cores: TF32 cuts numbers off", TENSOR_CORES, "(__float_as_uint(x) + 0x1000u) & 0xffffe000u", "__float_as_uint(x) & 0xffff0000u"),
    ("tensor cores: TF32 taken for exact", CUDA_ATTENTION, "q.dtype != np.float32 or not self.gemm.tf32", "True"),
    ("cuda attention: nobody waits for the tiles", TILES, "wait_for_batches<1>();", ""),
    ("cuda attention: the last tiles come too late", TILES, "        wait_for_batches<0>();", ""),
    ("cuda attention: unaligned rows copied as aligned", TILES, "if (((unsigned long long)from | stride * sizeof(T)) % 16 == 0) {", "if (true) {"),
    ("cuda attention: infinite scores make NaN", FUSED, "new_top[i] == minus_infinity() ? 0 : new_top[i]", "new_top[i]"),
    ("cuda attention: bfloat16 never runs on tensor cores", CUDA_ATTENTION, '"bfloat16": 128, ', ""),
    ("cuda attention: other numbers of heads", CUDA_ATTENTION, "q.size and fit)", "q.size)"),
    ("cuda: layer norm stops after one row of a warp", NORM, "    for (long long row = row_of_warp(); row < n; row += thread_count() / WARP) {\n        ThreadColumns", "    for (long long row = row_of_warp(); row < n; row = n) {\n        ThreadColumns"),
    ("cuda: softmax of infinite scores makes NaN", SOFTMAX, "if (top < 0 && top - top != 0) top = 0;", ""),
    ("cuda linear: copies of weights are never used", CUDA, "if weight.dtype != dtype and self._copies:", "if False:"),
    ("cuda linear: padding that is not cleared", CUDA, "y[:, :c] = x", "y[...] = x[:, :1]; y[:, :c] = x"),
    ("cuda linear: padding in the logits", CUDA, "return y[:, :columns].reshape(*x.shape[:-1], columns)", "return y.reshape(*x.shape[:-1], -1)"),
    ("cuda linear: a padded gradient forgets the one before", CUDA, "dweight = added(self._product(rows.T, dy, dtype)[:, :columns], onto[0])", "dweight = self._product(rows.T, dy, dtype)[:, :columns]"),
    ("cuda linear: a bias that is never added", CUDA, "if bias is not None and y.size:", "if False:"),
    ("cuda: cross-entropy reads rows without the gaps", SOFTMAX, "logits += row * stride;\n    A top", "logits += row * v;\n    A top"),
    ("cuda: cross-entropy counts what is past the end", SOFTMAX, "total += first + j < v ? exp(values.at[j] - top) : (A)0", "total += exp(values.at[j] - top)"),
    ("cuda linear: the bias is added twice", CUDA, "y = product_with_bias(self.xp, self.gemm, rows, rounded, self._rounded(bias, x.dtype))", "y = product_with_bias(self.xp, self.gemm, rows, rounded, 2 * self._rounded(bias, x.dtype))"),
    ("cuda linear: a rounded copy of another weight", CUDA, "            start += weight.size\n", ""),
    ("cuda linear: a transposed weight as it lies", CUDA, "return copy.T", "return copy.reshape(copy.T.shape)"),
    ("cuda linear: copies of weights stay", CUDA, "            self._copies.clear()", "            pass"),
    ("cuda: Philox with nine rounds", COMMON, "round < 10", "round < 9"),
    ("cuda: warps share a row", COMMON, "+ threadIdx.x / WARP; }", "; }"),
    ("text: a cut between two spaces", DESCRIPTION, r'(?<=\S)(?= )|', r'(?= )|'),
    ("text: a cut in front of a letter", DESCRIPTION, r'(?<=[^\W_])(?=[\s', r'(?<=[^\W_])(?=[\w\s'),
    ("text: the end of a stream is lost", BPE, 'return self._decoder.decode(b"", final=True)', 'return ""'),
    ("text: every byte counted as a character", BPE, "byte & 0xC0 != 0x80", "True"),
    ("text: special tokens in a text", BPE, "encode_special_tokens = True", "encode_special_tokens = False"),
    ("text: a BPE learns from the held-out part", READING, "train_on(_length_of(stored[0], limit))", "_length_of(stored[0], limit)"),
    ("text: a token reaches into the held-out part", READING, "reader.take(n_train)))", "reader.take(length)))"),
    ("text: a taken piece is lost", READING, "taken, self._rest = piece[:n], piece[n:]", "taken, self._rest = piece[:n], ''"),
    ("text: the beginning is one character long", RECORD, "yield part[: begins[left]]", "yield part[: begins[max(0, left - 1)]]"),
    ("text: characters of a piece counted twice", RECORD, "left -= len(begins)", "left -= 2 * len(begins)"),
    ("text: bits per byte from characters", LOSS, "self.n_targets / self.n_bytes", "self.n_targets / self.n_characters"),
    ("text: the first token counts as predicted", LOSS, "predicted = np.asarray(ids)[1:]", "predicted = np.asarray(ids)"),
    ("text: compared from where one model begins", COMPARISON, "first = max(", "first = min("),
    ("text: a text of its own judged as if split", JUDGED, "text.n_train < len(ids):", "False:"),
    ("text: new characters with old rows", RESIZE, "n_known = min(n_known, model.config.vocab_size, config.vocab_size)", "n_known = model.config.vocab_size"),
    ("text: new columns overwrite the old ones", RESIZE, 'name == "lm_head.weight" else None', 'name == "none" else None'),
    ("exchange: q not scaled", HUGGING_FACE, ".q_scale(int", ".q_scale(0 * int"),
    ("exchange: an output layer of its own ignored", HUGGING_FACE, "if not np.array_equal(tensors.take(head), tensors.take(table)):", "if False:"),
    ("exchange: overwrites what is there", HUGGING_FACE, "or any(path.iterdir()))", "or False)"),
    ("exchange: infinite in half precision", WEIGHTS, "if not np.isfinite(result).all():", "if False:"),
    ("exchange: rotary neighbours and halves mixed up", ARCHITECTURES, "np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)", "np.arange(1, head_dim, 2), np.arange(0, head_dim, 2)"),
    ("exchange: heads and parts mixed up", ARCHITECTURES, "np.stack([turned[0], turned[1], columns[2]], axis=1)", "np.stack([turned[0], turned[1], columns[2]], axis=0)"),
    ("exchange: values are turned", ARCHITECTURES, "turned[1], columns[2]]", "turned[1], turned[2]]"),
    ("exchange: parallel residuals accepted", ARCHITECTURES, 'get.refuse("use_parallel_residual", False, default=True)', "pass"),
    ("exchange: another epsilon accepted", ARCHITECTURES, "if found_eps != LayerNorm.eps:", "if False:"),
    ("exchange: bfloat16 with the wrong exponent", SAFETENSORS, '.astype("<u4") << 16', '.astype("<u4") << 15'),
    ("exchange: holes and overlaps accepted", SAFETENSORS, "if begin != end:", "if False:"),
    ("exchange: NaN accepted", SAFETENSORS, "if not np.isfinite(array).all():", "if False:"),
    ("exchange: a logit of 100 for the end", GGUF, "NEVER = -100.0", "NEVER = 100.0"),
    ("exchange: the other logits move with the end", GGUF, "w = w - np.outer(1 / safe, t * (safe @ w) / c)", "pass"),
    ("exchange: the norm's sum forgotten", GGUF, "t = 1 - (b / safe).sum() / c", "t = 1.0"),
    ("exchange: padding stays", GGUF, 'ours["wte.weight"][:n]', 'ours["wte.weight"]'),
    ("exchange: matrices not transposed", GGUF, "return array.ndim == 2 and name not in", "return array.ndim == 3 and name not in"),
    ("exchange: no padding of positions", GGUF, "more = -len(table) % CONTEXT_MULTIPLE", "more = 0"),
    ("ranks: sums in the order of the other end", RANKS, "total = parts[0]", "total = (parts := parts[::-1])[0]"),
    ("ranks: a sum without the last rank", RANKS, "for part in parts[1:]:", "for part in parts[1:-1]:"),
    ("ranks: values of the wrong rank", RANKS, "own = self._ranks.together(lambda: self._workers.map(function, everything[self._ranks.rank :: size]))", "own = self._ranks.together(lambda: self._workers.map(function, everything[size - 1 - self._ranks.rank :: size]))"),
    ("ranks: the first rank does not send its value", RANKS, "return value if self.is_first else pickle.loads(array.data)", "return value"),
    ("ranks: a failure ends one rank alone", RANKS, "if failures and self.rank != failures[0]:", "if failures and self.rank in failures[1:]:"),
    ("ranks: nobody asks for a missing rank", RANKS, "self._find_missing()", "pass"),
    ("ranks: the wrong rank is named", RANKS, "missing.discard(status.source)", "missing.discard(1 - status.source)"),
    ("ranks: all compute the same micro-batches", STEP, "everything[self.ranks.rank :: self.ranks.size]", "everything[:: self.ranks.size]"),
    ("ranks: gradients are not added up", STEP, "self.ranks.add_up(self.model.flat.grad)", "pass"),
    ("ranks: a rank without work keeps its gradient", STEP, "        if not micro_batches:\n            self.model.zero_grad()", "        if not micro_batches:\n            pass"),
    ("ranks: one rank's loss for all", STEP, "return sum(self.ranks.gather(float(loss)))", "return float(loss)"),
    ("ranks: a signal stops one rank", TRAINER, "any(self.ranks.gather(stop_requested()))", "stop_requested()"),
    ("ranks: all write files", TRAINER, "if out is not None and ranks.is_first else None", "if out is not None else None"),
    ("ranks: nobody compares", CHECKS, "    if ranks.size == 1:\n        return\n    if model:", "    return\n    if model:"),
    ("ranks: auto always starts", TRAIN, 'args.resume = "" if is_there else None', "args.resume = None"),
    ("nccl: another type", NCCL, '"float64": "NCCL_FLOAT64"', '"float64": "NCCL_FLOAT32"'),
    ("native: GELU's slope without its second term", C_ELEMENTWISE, "vec slope = f + 2.0f * v * f * (1.0f - f) * du_dx", "vec slope = f"),
    ("native: GELU's cubic term without its 3", C_ELEMENTWISE, "square * (3 * GELU_SCALE", "square * (GELU_SCALE"),
    ("native: GELU's slope of huge values is NaN", C_ELEMENTWISE, "slope = where(square > splat(1e4f), f + (v - v), slope);", ""),
    ("native: dropout keeps one draw too few", C_ELEMENTWISE, "onto[i] + (draws[i] >= limit", "onto[i] + (draws[i] > limit + 2000"),
    ("native: dropout without scale", C_ELEMENTWISE, "y[i] = draws[i] >= limit ? x[i] * factor", "y[i] = draws[i] >= limit ? x[i]"),
    ("native: the residual sum forgotten", C_ELEMENTWISE, "y[i] = onto[i] + (", "y[i] = ("),
    ("native: AdamW without a correction", C_ELEMENTWISE, "lr / correction1, 1 / correction2, eps", "lr / correction1, 1, eps"),
    ("native: everything decays", C_ELEMENTWISE, "n_decay, n, 1, a);", "n_decay, n, 1 - lr * weight_decay, a);"),
    ("native: layer norm's mean counts what is past the end", C_NORM, "vec centred = load_some(x + i, c - i, m) - m;", "vec centred = load_some(x + i, c - i, 0) - m;"),
    ("native: layer norm without eps", C_NORM, "sum_of(squares) / c + (float)eps", "sum_of(squares) / c"),
    ("native: layer norm never adds the bias", C_NORM, "bias ? value + load_some(bias + i, c - i, 0) : value", "value"),
    ("native: layer norm's variance term forgotten", C_NORM, "g - mean_g - xhat * mean_g_xhat", "g - mean_g"),
    ("native: layer norm's dweight of one row", C_NORM, "load_some(dweight + i, c - i, 0) + d * xhat", "d * xhat"),
    ("native: a bias's gradient without the first row", C_NORM, "for (int64_t row = first; row < last; row++) sum", "for (int64_t row = first + 1; row < last; row++) sum"),
    ("native: embedding's rows are not added up", C_NORM, "sum[i] += dy[i];", "sum[i] = dy[i];"),
    ("native: attention sees one token of the future", C_ATTENTION, "seen - rows + r + 1, seen,", "seen - rows + r + 1 + (r + 1 < rows), seen,"),
    ("native: future keys are not cleared", C_ATTENTION, "memset(e + n, 0, (seen - n) * sizeof(float));", ""),
    ("native: attention does not subtract its largest score", C_SOFTMAX, "return largest_of(top) == -__builtin_inff() ? 0 : largest_of(top);", "return 0;"),
    ("native: a row of -inf is NaN", C_ATTENTION, "*factor = total == 0 ? 0 : 1 / total;", "*factor = 1 / total;"),
    ("native: attention's dropped elements are forgotten", C_ATTENTION, "e[i] = draws[i] >= limit ? value : -value;", ""),
    ("native: attention's factor of another block", C_ATTENTION, "factor + start, keep, rows, head_dim", "factor, keep, rows, head_dim"),
    ("native: dropped elements send no row term", C_ATTENTION, "__builtin_fabsf(e[i]) * term", "kept[i] * term"),
    ("native: attention's scale forgotten on the way back", C_ATTENTION, "ds[i] = scale * (", "ds[i] = ("),
    ("native: attention's row term without the kept share", C_ATTENTION, "sum_of(sum) * factor[r] * keep", "sum_of(sum) * factor[r]"),
    ("native: products forget the gradients before", C_PRODUCT, "depth, add || block, packed_a, pairs", "depth, block > 0, packed_a, pairs"),
    ("native: dq where the queries of another head belong", C_ATTENTION, "head % h * dq_head", "head % h * dq_row"),
    ("cuda: products forget the gradients before", PRODUCTS, "onto is not None)", "False)"),
    ("cuda: sums of rows forget the gradients before", SUMS, "(column < c ? add_y : add_z) ? *result + sum : sum", "sum"),
    ("cuda: the sums of layer norm exchanged", SUMS, "column < c ? y + column : z + column - c", "z && column < c ? z + column : y + column - (z ? c : 0)"),
    ("cuda: an embedding's rows beyond the first of a warp", EMBEDDING, "found; found &= found - 1", "found; found = 0"),
    ("cuda: an embedding forgets the gradients before", EMBEDDING, "i < c && !add; i", "i < c; i"),
    ("self-attention: keys are taken for values", REFERENCE, "enumerate((q, k, v))", "enumerate((q, v, k))"),
    ("gradients added by a kernel are added again", OPS, "(dx if total is None else None for", "(dx for"),
    ("gradients of any layout are added to by a kernel", OPS, "return grad if grad.flags.c_contiguous and", "return grad if"),
    ("gradients of results are added to by a kernel", OPS, " or p._node is not None", ""),
    ("gradients of frozen leaves are added to by a kernel", OPS, "or not p.requires_grad ", ""),
    ("native: dk of the last block alone", C_ATTENTION, "dk + at_dk, dk_row, seen, head_dim, rows, add, s.a, 0", "dk + at_dk, dk_row, seen, head_dim, rows, 0, s.a, 0"),
    ("native: values past the first panel of keys are left out", C_ATTENTION, "smaller(seen - p, STEPS), p > 0, packed_a, 0);", "smaller(seen - p, STEPS), 0, packed_a, 0);"),
    ("native: too little scratch memory for attention", C_ATTENTION, "QUERIES * (2 * n_key + head_dim + width)", "QUERIES * (n_key + head_dim)"),
    ("native: a product forgets its bias", C_PRODUCT, "t->bias && !t->add ? load_some", "t->add ? load_some"),
    ("native: a product of the last block of k alone", C_PRODUCT, "depth, add || block, packed_a, pairs", "depth, add, packed_a, pairs"),
    ("native: an odd last value of k is left out", C_PRODUCT, "pairs ? (depth + 1) / 2 : depth, out_row", "pairs ? depth / 2 : depth, out_row"),
    ("native: a product with the columns of another vector", C_PRODUCT, "float *at = to + p / values * COLUMNS + w;", "float *at = to + p / values * COLUMNS + (w ^ LANES);"),
    ("native: a product of too few rows", C_PRODUCT, "rows - r > ROWS * 2 / 3 ? 3 : rows - r > ROWS / 3 ? 2 : 1", "rows - r > ROWS * 2 / 3 ? 3 : 2 - (rows - r < ROWS * 2 / 3)"),
    ("native: a product whose last columns are zeros", C_PRODUCT, "kinds[(n - j > LANES) * 3 + thirds - 1]", "kinds[thirds - 1]"),
    ("native: a transpose with quarters in place", C_PRODUCT, "words[i] = (vec)_mm512_permutex2var_ps(a, upper, b);", "words[i] = (vec)a;"),
    ("native: products of float32 are rounded", NATIVE, 'return "product" if self.one_thread', 'return "bfloat16_product" if self.one_thread'),
    ("native: own products beside threads of the BLAS", NATIVE, 'return "product" if self.one_thread and', 'return "product" if'),
    ("native: threads share scratch memory", LIBRARY, "self._of_thread = threading.local()", "self._of_thread = type(self)"),
    ("native: absent keys are seen", C_DECODE, "(absent ? absent[t] : 0.0f)", "0.0f"),
    ("native: attention reads another head's values", C_DECODE, "k + at, v + at, absent ?", "k + at, v + b * kv_stride, absent ?"),
    ("native: a block without its first layer norm", C_DECODE, "columns_of_product(normed, w->qkv,", "columns_of_product(x, w->qkv,"),
    ("native: a block turns queries alone", C_DECODE, "rotate(key, rotations + b * head_dim, head_dim);", ""),
    ("native: a block overwrites the newest token", C_DECODE, "lengths[b] % room", "(lengths[b] < room ? lengths[b] : room - 1)"),
    ("native: a block sees too many keys", C_DECODE, "lengths[b] < room ? lengths[b] + 1 : room", "room"),
    ("native: a block forgets its input", C_DECODE, "w->proj_bias, x, batch, d_ff, c, 1", "w->proj_bias, x, batch, d_ff, c, 0"),
    ("native: a thread does not compute all of its heads", C_DECODE, "batch * heads * (member + 1) / members", "batch * heads * member / members + 1"),
    ("native: threads leave out the last columns", C_DECODE, "((i) == members ? (columns)", "((i) > members ? (columns)"),
    ("native: threads do not wait for all heads", C_DECODE, "        MEET;\n        columns_of_product(attended", "        columns_of_product(attended"),
    ("native: an interrupted call leaves its helpers waiting", TEAM, "meeting[2] = 1", "meeting[2] = 0"),
    ("native: all blocks read the cache of the first", C_DECODE, "w++, cache += 2 * most * room * c", "w++"),
    ("native: a block forgets the cache's room for more sequences", C_DECODE, "*v = k + most * room * c", "*v = k + batch * room * c"),
    ("decoding goes on with weights that were replaced", GPT, "and all(map(operator.is_, weights, cache.weights))", ""),
    ("native: cross-entropy's target forgotten", C_SOFTMAX, "dlogits[targets[row]] -= dy[row];", ""),
    ("native: the exponential with a wrong coefficient", VECTOR, "1.3981999507e-3f", "1.2981999507e-3f"),
    ("native: the exponential of tiny results", VECTOR, "where(x < splat(-104.0f), splat(-104.0f), x)", "where(x < splat(-87.0f), splat(-87.0f), x)"),
    ("native: half of 2^k", VECTOR, "half = whole >> 1;", "half = whole;"),
    ("native: the last elements of a row are not stored", VECTOR, "_mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1)", "_mm512_mask_storeu_ps(to, (__mmask16)((1u << n) / 2)"),
    ("native: a few rows without the rest of n", C_DECODE, "for (; i < n; i++)", "for (; i < n - 1; i++)"),
    ("native: a few rows without the last columns", C_DECODE, "n, m, end - whole);", "n, m, end - whole - 1);"),
    ("native: the last rows of the weights twice", C_DECODE, "n - i < DEPTH ? n - i : DEPTH", "DEPTH"),
    ("native: a copy of weights without its last vector", C_DECODE, "for (int v = 0; v < VECTORS; v++) store(copy", "for (int v = 1; v < VECTORS; v++) store(copy"),
    ("native: the stride of copied weights", C_DECODE, "block_product(x, copy, y, 0, n, WIDTH, m, depth, 6, 0)", "block_product(x, copy, y, 0, n, m, m, depth, 6, 0)"),
    ("native: the last numbers of a head are not weighed", C_DECODE, "sum += scores[t] * load_some(value", "sum += load_some(value"),
    ("native: a few rows forget what is there", C_DECODE, "(add ? y[r * m + j] : 0.0f)", "0.0f"),
    ("exchange: merges from the right", GGUF, 'f"{token[:k]} {token[k]}"', 'f"{token[k]} {token[:k]}"'),
]  # fmt: skip


def plant(bug, folder):
    """Copy the package and its tests into `folder`, and put the bug into the copy."""
    name, file, before, after = bug
    for part in ("npgpt", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "benchmarks"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "data", folder / "data")
    path = folder / "npgpt" / file
    source = path.read_text(encoding="utf-8")
    if source.count(before) != 1:
        raise SystemExit(f"{name}: {file} has {source.count(before)} places like {before!r}, expected one")
    path.write_text(source.replace(before, after), encoding="utf-8", newline="\n")
    if path.parent.name == "native":
        build = "import pathlib, support.native; support.native.build(pathlib.Path('npgpt/kernels/native'))"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder / "tests")]), "NPGPT_NATIVE": "0"}
        subprocess.run([sys.executable, "-c", build], cwd=folder, env=environment, check=True)


def caught(bug):
    """The first test that fails because of the bug, or None."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plant(bug, folder)
        covering = [
            (OF_NATIVE, NATIVE_TESTS),
            (OF_RANKS, RANK_TESTS),
            (OF_A_GPU, GPU_TESTS),
            (OF_TEXTS, TEXT_TESTS),
            (OF_DRAWING, DRAWING_TESTS),
            (OF_PAGES, PAGE_TESTS),
        ]
        files = next((tests for bugs, tests in covering if bug[1] in bugs), TESTS)
        tests = [f"tests/{file}" for file in files]
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", "300"]
        result = subprocess.run(
            [*pytest, *tests],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": place},
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if result.returncode == 0:
            return None
        failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
        if result.returncode < 0 and bug[1] in OF_NATIVE:
            return f"the tests died of signal {-result.returncode}"
        if result.returncode != 1 or not failed:
            raise SystemExit(f"{bug[0]}: the tests did not run: {result.stdout[-1000:]}")
        return failed[0].split(" - ")[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of the bugs to plant (default: all)")
    args = parser.parse_args()
    bugs = [bug for bug in BUGS if not args.names or any(name in bug[0] for name in args.names)]
    if not bugs:
        raise SystemExit(f"no planted bug has a name with {' or '.join(args.names)}; add one to BUGS")
    clean = caught(("nothing", REFERENCE, '"""The definition of every', '"""The definition of every'))
    if clean:
        raise SystemExit(f"the tests fail without any bug: {clean}")
    started, survivors = time.perf_counter(), []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for bug, found in zip(bugs, pool.map(caught, bugs), strict=True):
            print(f"{'caught  ' if found else 'SURVIVED'}  {bug[0]:60} {found or ''}", flush=True)
            survivors += [] if found else [bug[0]]
    print(f"\n{len(bugs)} planted, {len(bugs) - len(survivors)} caught, {time.perf_counter() - started:.0f} s")
    if survivors:
        sys.exit("survived: " + "; ".join(survivors))


if __name__ == "__main__":
    main()
