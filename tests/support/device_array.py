"""An array module that is to NumPy what CuPy is, as far as the engine can tell: its arrays are another type, which never turns
into NumPy's by itself, and every way to the host is counted, since a GPU's user waits there.

It computes with NumPy. What CuPy lacks or does otherwise in its own code is not seen.
"""

import numpy as np

waits = []  # what went to the host, since the list was last cleared


class ndarray:  # noqa: N801 (CuPy's name)
    """A NumPy array that only its own module may look at, as `.on_host`."""

    __array_ufunc__ = None  # numpy + this: as with CuPy, not NumPy's affair
    __hash__ = None

    def __init__(self, on_host):
        self.on_host = on_host

    shape = property(lambda self: self.on_host.shape)
    strides = property(lambda self: self.on_host.strides)
    ndim = property(lambda self: self.on_host.ndim)
    size = property(lambda self: self.on_host.size)
    itemsize = property(lambda self: self.on_host.itemsize)
    dtype = property(lambda self: self.on_host.dtype)
    flags = property(lambda self: self.on_host.flags)
    T = property(lambda self: ndarray(self.on_host.T))

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion to a NumPy array is not allowed")

    def __len__(self):
        return len(self.on_host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        return _there(self.on_host[_here(index)])

    def __setitem__(self, index, value):
        self.on_host[_here(index)] = _here(value)

    def get(self):
        waits.append("get")
        return self.on_host.copy()

    def item(self):
        waits.append("item")
        return self.on_host.item()

    def __float__(self):
        waits.append("float")
        return float(self.on_host)

    def __bool__(self):
        waits.append("bool")
        return bool(self.on_host)


def _here(x):
    """The host's arrays of arguments; NumPy's own arrays are refused, numbers are not."""
    if isinstance(x, ndarray):
        return x.on_host
    if isinstance(x, tuple | list):
        return type(x)(_here(item) for item in x)
    if isinstance(x, np.ndarray):
        raise TypeError(f"expected an array of this device, got NumPy's of shape {x.shape}")
    return x


def _there(x):
    """A result as this device's; there are no scalars, but arrays of no dimensions."""
    return ndarray(np.asarray(x)) if isinstance(x, np.ndarray | np.generic) else x


def _method(name):
    def call(self, *args, **kwargs):
        return _there(getattr(self.on_host, name)(*_here(args), **{k: _here(v) for k, v in kwargs.items()}))

    return call


def _in_place(name):
    def call(self, other):
        getattr(self.on_host, name)(_here(other))
        return self

    return call


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "and", "or"):
    setattr(ndarray, f"__{_name}__", _method(f"__{_name}__"))
    setattr(ndarray, f"__r{_name}__", _method(f"__r{_name}__"))
for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(ndarray, f"__{_name}__", _in_place(f"__{_name}__"))
for _name in ("__neg__", "__invert__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(ndarray, _name, _method(_name))
for _name in ("reshape", "transpose", "swapaxes", "astype", "copy", "sum", "max", "min", "mean", "all", "any", "argmax"):
    setattr(ndarray, _name, _method(_name))


class Module:
    """Stands for the module `cupy`."""

    ndarray = ndarray
    inf = np.inf

    def asarray(self, x, dtype=None):
        """The way to the device, for anything."""
        return ndarray(np.array(_here(x) if isinstance(x, ndarray) else x, dtype=dtype, copy=None))

    def array(self, x, dtype=None):
        return ndarray(np.array(_here(x) if isinstance(x, ndarray) else x, dtype=dtype))

    def ascontiguousarray(self, x, dtype=None):
        return ndarray(np.asarray(_here(x), dtype=dtype, order="C"))

    def asnumpy(self, x):
        return x.get()

    def __getattr__(self, name):
        function = getattr(np, name)
        if not callable(function) or isinstance(function, type):
            return function

        def call(*args, **kwargs):
            return _there(function(*_here(args), **{k: _here(v) for k, v in kwargs.items()}))

        call.at = lambda *args: function.at(*_here(args))  # of ufuncs
        return call


def launch_on(launch):
    """A `Launch` of host arrays, for arrays of this module."""
    return lambda name, dtype, grid, threads, arguments: launch(name, dtype, grid, threads, _here(tuple(arguments)))


def gemm_on(gemm):
    """A `products.Gemm` of host arrays, for arrays of this module."""

    class Gemm:
        tf32 = False

        def __call__(self, a, b, out, sizes, count):
            gemm(*(operand._replace(array=operand.array.on_host) for operand in (a, b, out)), sizes, count)

    return Gemm()
