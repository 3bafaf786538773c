"""What CUDA code would do, counted on a machine without a GPU.

Tensors on a fake CUDA device have shapes but no memory, and a dispatch mode sees every operator:
kernel launches, host synchronisations and copies between devices (each with the line that asks for
it), float64 work, bytes read and written, flops of matrix products, and the most bytes alive.

Where a value decides a branch, `scalar` answers: a number, or a function of the tensor and of the
asking line. Autograd's own backward does not run here: call a Function's `forward` and `backward`.
"""

from __future__ import annotations

import collections
import contextlib
import linecache
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Scalar = float | Callable[[torch.Tensor, str], float]

VIEWS = frozenset(
    """view t transpose slice select unsqueeze squeeze expand permute detach alias as_strided unbind
    split _unsafe_view diagonal split_with_sizes unfold mT lift_fresh view_as_real _reshape_alias
    device new_empty chunk movedim""".split()  # noqa: SIM905
)
# What a GPU's answer decides on the host: the shape of a result, or a number.
WAITS = ("nonzero", "equal", "is_nonzero", "masked_select", "unique", "_unique2")
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1, "mv": 0}


def asking_line() -> str:
    """Return the nearest line of the packages on the stack, as `file.py:12 text`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/packages/rlo-" in file:
            text = linecache.getline(file, frame.f_lineno).strip()
            return f"{file.rsplit('/src/', 1)[-1]}:{frame.f_lineno} {text}"
        frame = frame.f_back
    return ""


class Trace(TorchDispatchMode):
    """Counts of one stretch of code; see the module's docstring.

    Attributes:
        launches: Kernels started, Triton's included.
        launched: Launches by the name of the operator or kernel.
        sites: Launches by the line that asked for them.
        syncs: Times the host waits for the device, by what for and by line.
        double: Operators that touch float64 tensors of more than one element, by line.
        bytes: Read and written by operators (not by Triton kernels).
        flops: Of matrix products.
        peak: The most bytes of CUDA storages alive at one time that were made in the trace.
        devices: The CUDA devices that results were made on.
        kernel_devices: Launches of Triton kernels by the number of the current device.
    """

    def __init__(self, scalar: Scalar = 1) -> None:
        super().__init__()
        self.scalar = scalar
        self.launches = self.bytes = self.flops = self.peak = 0
        self.launched: collections.Counter[str] = collections.Counter()
        self.sites: collections.Counter[str] = collections.Counter()
        self.syncs: collections.Counter[tuple[str, str]] = collections.Counter()
        self.double: collections.Counter[tuple[str, str]] = collections.Counter()
        self.devices: set[str] = set()
        self.kernel_devices: collections.Counter[int] = collections.Counter()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(t.is_cuda for t in given)
        if on_gpu and name in ("_local_scalar_dense", "item"):
            return self._asked(given[0])
        if on_gpu and name in WAITS:
            self.syncs[name, asking_line()] += 1
            if name == "equal":
                return False
            if name == "masked_select":  # as if every element were wanted
                return given[0].new_empty(given[0].numel())
            if name == "nonzero":
                t = given[0]
                return torch.empty(t.shape[0], t.dim(), dtype=torch.int64, device=t.device)
        indexed = name.startswith(("index", "_index_put")) and len(args) > 1
        if on_gpu and indexed and isinstance(args[1], (list, tuple)):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                self.syncs["boolean index", asking_line()] += 1
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        every = given + made
        if name in ("_to_copy", "copy_") and {t.device.type for t in every} == {"cpu", "cuda"}:
            waits = not kwargs.get("non_blocking", False) and not (
                name == "copy_" and len(args) > 2 and args[2]
            )
            if waits:
                self.syncs["copy between devices", asking_line()] += 1
        if any(t.is_cuda for t in every):
            self._keep(made)
            if name not in VIEWS and not name.startswith("empty"):
                self._launched(name, args, every)
        return result

    def _asked(self, tensor: torch.Tensor) -> Any:
        line = asking_line()
        self.syncs["item", line] += 1
        value = self.scalar(tensor, line) if callable(self.scalar) else self.scalar
        if tensor.dtype == torch.bool:
            return bool(value)
        return float(value) if tensor.is_floating_point() else int(value)

    def _launched(self, name: str, args: Any, every: Sequence[torch.Tensor]) -> None:
        line = asking_line()
        self.launches += 1
        self.launched[name] += 1
        self.sites[line] += 1
        if any(t.dtype == torch.float64 and t.numel() > 1 for t in every):
            self.double[name, line] += 1
        if name in PRODUCTS:
            a, b = args[PRODUCTS[name]], args[PRODUCTS[name] + 1]
            self.flops += 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
        distinct = {id(t): t for t in every}.values()
        self.bytes += sum(t.numel() * t.element_size() for t in distinct)

    def _keep(self, made: Sequence[torch.Tensor]) -> None:
        for tensor in made:
            if tensor.is_cuda:
                self.devices.add(str(tensor.device))
                storage = tensor.untyped_storage()
                self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))

    def restart(self) -> None:
        """Forget what was counted, and take what is alive now for not made in the trace."""
        self.launches = self.bytes = self.flops = self.peak = 0
        for counter in (self.launched, self.sites, self.syncs, self.double, self.kernel_devices):
            counter.clear()
        self._alive = {key: (ref, 0) for key, (ref, _) in self._alive.items()}

    def kernel(self, name: str) -> None:
        """Count the launch of a Triton kernel."""
        self.launches += 1
        self.launched[name] += 1
        self.kernel_devices[torch.cuda.current_device()] += 1
        self.sites[asking_line()] += 1

    def summary(self) -> str:
        """Return what a failed assertion should show."""
        lines = [
            f"{self.launches} launches, {sum(self.syncs.values())} syncs, "
            f"{self.bytes / 1e9:.1f} GB, {self.flops / 1e12:.2f} TFLOP, "
            f"peak {self.peak / 1e9:.3f} GB"
        ]
        tables: list[collections.Counter[Any]] = [self.syncs, self.double, self.sites]
        lines += [f"  {count:6d} {what}" for t in tables for what, count in t.most_common(12)]
        return "\n".join(lines)


class _Counted:
    """Stands in for a Triton kernel."""

    def __init__(self, name: str, trace: Trace) -> None:
        self.name, self.trace = name, trace

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.trace.kernel(self.name)


@contextlib.contextmanager
def fake_gpu(*modules: ModuleType, scalar: Scalar = 1, devices: int = 1) -> Iterator[Trace]:
    """Trace a stretch of code on fake CUDA devices.

    Args:
        modules: Their Triton kernels (names that end in `_kernel`) are counted, not run.
        scalar: The answer to a value that the host asks for.
        devices: How many there are.
    """
    trace = Trace(scalar)
    current = [0]

    def exchange(index: int) -> int:
        before = current[0]
        if index >= 0:
            current[0] = index
        return before

    with contextlib.ExitStack() as stack:
        for name, value in (
            ("_exchange_device", exchange),
            ("_maybe_exchange_device", exchange),
            ("current_device", lambda: current[0]),
            ("device_count", lambda: devices),
            # Lightning sets a variable by which this follows device_count and a driver is asked.
            ("is_available", lambda: False),
        ):
            stack.enter_context(_replaced(torch.cuda, name, value))
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(_replaced(module, name, _Counted(name, trace)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(trace)
        yield trace


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
