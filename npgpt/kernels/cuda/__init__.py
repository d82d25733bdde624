"""The kernels for an NVIDIA GPU. reference.py and updates.py define what they compute.

Which operation launches which kernel: kernels.py, and attention.py for attention. base.py has what both need for it.

    launch.py               compiles the .cu files and launches kernels
    common.cu               types, reductions over a warp, random numbers
    sums.cu norm.cu         sums over rows, layer norm
    elementwise.cu          GELU, dropout, rotary positions, AdamW and more
    softmax.cu              cross-entropy; softmax of attention by products
    embedding.cu            the gradient of an embedding table
    attention.cu            attention on tensor cores, with tiles.cu and tensor_cores.cu
    products.py             products by cuBLAS, with operands.py, products_with_bias.py and cublas.py
    random.py recording.py  random generators; CUDA graphs

Each .cu file uses what the files before it define; launch.py has their order. T is the type of activations, A that of sums, and
GROUP the number of neighbouring elements that a thread works on.
"""
