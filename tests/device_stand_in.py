"""A stand-in for an accelerator on a CPU: it notices where the host would have to wait for what the device computes.

Tensors "of the device" are those that are put there (`own`), all that is computed from them, and all that is made
while `inside` says so. To read a value of one, or to need it for a shape, makes the host wait on CUDA: it is noted here
with the line that did it. Copies to the host count unless they are asked for with non_blocking. What cannot be seen
here: a copy of host memory that is not pinned, and what a library does on CUDA alone.
"""

from __future__ import annotations

import contextlib
import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Operators that hand a value to the host, or need values for the shape of their result.
LOOKS = {
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.allclose),
    *(
        aten.nonzero,
        aten.argwhere,
        aten.masked_select,
        aten._unique2,
        aten.unique_consecutive,
        aten.unique_dim,
    ),
    *(aten.bincount, aten.repeat_interleave),
}
MASKED = {
    aten.index,
    aten.index_put,
    aten.index_put_,
    aten._index_put_impl_,
}  # with a mask they look for its ones
TO_HOST = {
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.cpu,
    torch.Tensor.item,
    torch.Tensor.__array__,
}


class Device:
    """`looks`: where the host had to wait, while the stand-in was on (`with device.on()`)."""

    def __init__(self):
        self.looks: list[str] = []
        self.inside = False  # everything that is made now is made on the device
        self._storages = {}

    def own(self, *values):
        """These tensors are on the device. Their memory is kept, so that no other tensor can be taken for them."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = storage

    def has(self, values):
        return any(
            isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self._storages
            for tensor in tree_leaves(values)
        )

    @contextlib.contextmanager
    def on(self):
        with _Operators(self), _Methods(self):
            yield self

    @contextlib.contextmanager
    def computing(self):
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    @contextlib.contextmanager
    def reading(self):
        """Inside, reading is what is meant: the numbers are on the host."""
        before = len(self.looks)
        yield
        del self.looks[before:]

    def note(self, what):
        own = [
            f for f in traceback.extract_stack() if "/minilm/" in f.filename or "/tests/test_" in f.filename
        ]
        place = (
            f"{own[-1].filename.rpartition('/')[2]}:{own[-1].lineno} {own[-1].line}" if own else "somewhere"
        )
        self.looks.append(f"{what} in {place}")


class _Operators(TorchDispatchMode):
    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        touched = self.device.inside or self.device.has((args, kwargs))
        if touched and packet in LOOKS:
            self.device.note(str(packet))
        if packet in MASKED and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.device.note(f"{packet} by a mask")
        result = func(*args, **kwargs)
        if touched:
            self.device.own(result)
        return result


class _Methods(TorchFunctionMode):
    """What no operator shows: values that leave by another way, and host values that go to the device one by one."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in TO_HOST and self.device.has(args[:1]):
            self.device.note(func.__name__)
        # A device object is the tensors' own here, which would be the accelerator: only the word means the host.
        to_host = func is torch.Tensor.to and "cpu" in [
            v for v in (*args[1:], *kwargs.values()) if isinstance(v, str)
        ]
        if to_host and self.device.has(args[:1]) and not kwargs.get("non_blocking"):
            self.device.note("to the CPU")
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            self.device.note(func.__name__)
        return func(*args, **kwargs)
