"""An array module that behaves like CuPy for the engine, and computes with NumPy.

Its arrays have a type of their own, and none of them becomes a NumPy array by itself. The list `waits` records every copy to
the host, because the CPU waits for the GPU there. Functions that CuPy lacks, or computes differently, go unnoticed.
"""

from types import SimpleNamespace

import numpy as np

waits = []  # the copies to the host since the list was last cleared
# What CuPy would compute itself since the list was last cleared: the name of each function, and the bytes of its arrays.
computed = []


class ndarray:  # noqa: N801 (CuPy's name)
    """Holds a NumPy array in `.on_host`. Only this module may use it."""

    __array_ufunc__ = None  # `numpy_array + this` calls this class, as with CuPy
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
    data = property(lambda self: SimpleNamespace(ptr=self.on_host.ctypes.data))

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion to a NumPy array is not allowed")

    def __len__(self):
        return len(self.on_host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        return _there(self.on_host[_here(index)])

    def __setitem__(self, index, value):
        target = self.on_host[_here(index)]
        computed.append(("copy or fill", target.nbytes + (value.on_host.nbytes if isinstance(value, ndarray) else 0)))
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
    """The arguments with NumPy arrays in place of this module's. Numbers stay; a NumPy array raises TypeError."""
    if isinstance(x, ndarray):
        return x.on_host
    if isinstance(x, tuple | list):
        return type(x)(_here(item) for item in x)
    if isinstance(x, np.ndarray):
        raise TypeError(f"expected an array of this device, got NumPy's of shape {x.shape}")
    return x


def _there(x):
    """A result as an array of this module. A scalar becomes an array of no dimensions."""
    return ndarray(np.asarray(x)) if isinstance(x, np.ndarray | np.generic) else x


def _counted(name, result, *arguments):
    """The result of one of CuPy's functions. It is listed in `computed` unless it is a view or empty memory."""
    arrays = [x.on_host for x in arguments if isinstance(x, ndarray)]
    is_view = isinstance(result, np.ndarray) and any(np.may_share_memory(result, x) for x in arrays)
    if isinstance(result, np.ndarray | np.generic) and not is_view and not name.startswith("empty"):
        computed.append((name, result.nbytes + sum(x.nbytes for x in arrays)))
    return _there(result)


def _method(name):
    def call(self, *args, **kwargs):
        result = getattr(self.on_host, name)(*_here(args), **{k: _here(v) for k, v in kwargs.items()})
        return _counted(name, result, self, *args)

    return call


def _in_place(name):
    def call(self, other):
        getattr(self.on_host, name)(_here(other))
        computed.append((name, self.on_host.nbytes + (other.on_host.nbytes if isinstance(other, ndarray) else 0)))
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
    """Takes the place of the module `cupy`."""

    ndarray = ndarray
    inf = np.inf

    def asarray(self, x, dtype=None):
        """Copies any array or number to the device."""
        return _counted("asarray", np.array(_here(x) if isinstance(x, ndarray) else x, dtype=dtype, copy=None), x)

    def array(self, x, dtype=None):
        return _counted("array", np.array(_here(x) if isinstance(x, ndarray) else x, dtype=dtype), x)

    def ascontiguousarray(self, x, dtype=None):
        return _counted("ascontiguousarray", np.asarray(_here(x), dtype=dtype, order="C"), x)

    def asnumpy(self, x):
        return x.get()

    def __getattr__(self, name):
        function = getattr(np, name)
        if not callable(function) or isinstance(function, type):
            return function

        def call(*args, **kwargs):
            return _counted(name, function(*_here(args), **{k: _here(v) for k, v in kwargs.items()}), *args)

        call.at = lambda *args: function.at(*_here(args))  # ufuncs have a method `at`
        return call


class Recording:
    """Takes the place of a CUDA graph: each replay calls the function, and its arrays keep their addresses.

    As with a CUDA graph, the recording itself computes nothing, and the function must not copy to the host.
    """

    def __init__(self, function):
        self._function, self._result = function, None

    def __call__(self):
        before = len(waits)
        result = self._function()
        assert len(waits) == before, "a recorded function must not copy to the host"
        self._result = ndarray(np.empty_like(result.on_host)) if self._result is None else self._result
        self._result[...] = result
        return self._result


def launch_on(launch):
    """Turns a `Launch` for NumPy arrays into one for arrays of this module."""

    def launch_here(name, dtype, grid, threads, arguments, variant=None):
        launch(name, dtype, grid, threads, _here(tuple(arguments)), variant)

    launch_here.has_tensor_cores = launch.has_tensor_cores
    return launch_here


def _operand_here(operand):
    return operand._replace(array=operand.array.on_host)


def gemm_on(gemm):
    """Turns a `products.Gemm` for NumPy arrays into one for arrays of this module."""

    class Gemm:
        tf32 = False

        def __call__(self, a, b, out, sizes, count, add):
            gemm(*map(_operand_here, (a, b, out)), sizes, count, add)

        def with_bias(self, a, b, out, sizes, bias):
            return gemm.with_bias(*map(_operand_here, (a, b, out)), sizes, bias.on_host)

    return Gemm()
