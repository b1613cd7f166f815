"""A pretend GPU for tests on machines without one: real values on the CPU, CUDA's rules about devices.

    with FakeCuda() as gpu:
        ...                                   # torch.cuda.is_available() is True, torch.device("cuda") works
    gpu.syncs, gpu.late, gpu.launches, gpu.peak, gpu.faults, gpu.ops

or as a pytest fixture (see test_fake_cuda.py):

    @pytest.fixture
    def gpu():
        with FakeCuda() as gpu:
            yield gpu
        assert not gpu.faults

Several ranks: `torchrun --nproc_per_node=2 tests/fake_cuda.py` runs the script with its environment, each process with its own
FakeCuda; "nccl" becomes Gloo. Exit status 3: the run went well but for faults, which are printed.

A storage is tagged as lying on "cuda:0" where it was made or moved there; views share the tag. `Tensor.device`, `is_cuda`,
`to`, `cpu`, `numpy` and factories see the tag, every kernel checks the tags of its arguments as CUDA would:

- tensors of two devices in one kernel raise, but for CUDA's exceptions (0-dim CPU tensors in pointwise kernels, index tensors
  on the CPU, copies between devices); a generator must lie on the device that it draws for; `numpy` of a CUDA tensor raises;
- NCCL takes contiguous CUDA tensors alone (the collectives themselves run over Gloo);
- `capacity` bytes: what would exceed them raises torch.OutOfMemoryError, so that retries can be tested;
- streams: work on a tensor that another stream writes, without an event or wait between, is a fault, and so is freeing a tensor
  that another stream still uses without `record_stream`;
- a copy to the CPU that does not block, and is read without a synchronisation, is a fault.

Counted: `syncs` (by the line of the script that waits for the device), `late` (likewise the most kernels that such a wait was for
though they were launched after the value that is read: a value read "one step later" waits for that step), `launches` (kernels, views left out), `peak` bytes,
`ops` (kernel and dtypes, for a look into OpInfo's dtypesIfCUDA). Not seen: workspaces inside kernels, numerical differences of
CUDA's kernels, torch.compile (which runs its function eagerly here), whatever C++ decides by the device.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # each rank of a machine has its own
CPU = torch.device("cpu")
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount", "_unique2", "unique_dim",
         "unique_consecutive", "repeat_interleave"}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
SCALARS = {
    "fill_",
    "masked_fill",
    "masked_fill_",
    "where",
    "lerp",
    "lerp_",
    "clamp_min",
    "clamp_max",
}  # beside the pointwise ones

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.convolution.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_flash_attention_for_cpu_backward.default}  # fmt: skip


def computed(func: Any, args: tuple, kwargs: dict) -> Any:
    """What a kernel returns; products of bf16 in fp32, rounded once, as tensor cores do: CPUs without bf16 need 10 times as long."""
    if func not in PRODUCTS or not isinstance(args[0], Tensor) or args[0].dtype != torch.bfloat16:
        return func(*args, **kwargs)
    widened = lambda x: x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x  # noqa: E731
    out = func(*map(widened, args), **{name: widened(x) for name, x in kwargs.items()})
    if isinstance(out, Tensor):
        return out.bfloat16()
    kept = out[1:] if func is aten._scaled_dot_product_flash_attention_for_cpu.default else ()  # log-sum-exp stays fp32
    return *(x.bfloat16() for x in out[: len(out) - len(kept)]), *kept


@functools.cache
def schema_of(func: Any) -> tuple[str, tuple[str, ...], frozenset[str]]:
    """A kernel's name, its arguments' names and those that it writes; reading them from the schema takes longer than the kernel."""
    arguments = func._schema.arguments
    writes = frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return func._schema.name, tuple(a.name for a in arguments), writes


def tensors_in(*things: Any) -> list[Tensor]:
    """The tensors in arguments and results of kernels: nested lists, tuples and dicts (many times faster than a pytree)."""
    found: list[Tensor] = []
    for x in things:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors_in(*x)
        elif isinstance(x, dict):
            found += tensors_in(*x.values())
    return found


class DeviceMismatch(RuntimeError):
    """What CUDA would refuse."""


class Stream:
    """Work in order. `seen[s]` is how much of stream s is known to be complete when this stream's next work starts."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.time, self.seen = 0, Counter()

    def wait_stream(self, other: Stream) -> None:
        self.seen |= other.seen | Counter({other: other.time})

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.seen |= event.seen

    def synchronize(self) -> None:
        FakeCuda.now.host |= self.seen | Counter({self: self.time})

    def query(self) -> bool:
        return True


class Event:
    """A moment of a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seen: Counter = Counter()

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or FakeCuda.now.stream
        self.seen = stream.seen | Counter({stream: stream.time})

    def wait(self, stream: Stream | None = None) -> None:
        (stream or FakeCuda.now.stream).wait_event(self)

    def synchronize(self) -> None:
        FakeCuda.now.host |= self.seen

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: Event) -> float:
        return 0.1


class Block:
    """One allocation of the pretend GPU."""

    def __init__(self, gpu: FakeCuda, size: int) -> None:
        self.gpu, self.size, self.home = gpu, size, gpu.stream
        self.home.time += 1
        self.home.seen |= gpu.host
        self.written = (self.home, self.home.time)
        self.used: dict[Stream, int] = {}
        self.recorded: set[Stream] = set()
        gpu.live += size
        gpu.peak = max(gpu.peak, gpu.live)

    def __del__(self) -> None:
        self.gpu.live -= self.size
        for stream, time in self.used.items():
            if (
                stream is not self.home
                and stream not in self.recorded
                and (self.home.seen | self.gpu.host)[stream] < time
            ):
                self.gpu.fault("a tensor is freed while another stream uses it, without record_stream")


class Move(torch.autograd.Function):
    """A copy to the other device; its gradient travels back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_gpu: bool) -> Tensor:
        ctx.to_gpu = to_gpu
        return FakeCuda.now.moved(x, to_gpu)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return FakeCuda.now.moved(dy, not ctx.to_gpu), None


class PretendGenerator(torch.Generator):
    """A generator of the CPU that says that it is one of the device it was asked for."""

    device = CPU

    def __new__(cls, device: Any = "cpu") -> PretendGenerator:
        self = super().__new__(cls)
        self.device = GPU if torch.device(device).type == "cuda" else CPU
        return self

    def __init__(self, device: Any = "cpu") -> None:
        pass


class FakeCuda(contextlib.AbstractContextManager):
    """See the module's text."""

    now: FakeCuda

    def __init__(self, capacity: float = float("inf"), name: str = "NVIDIA H100 80GB HBM3", capability: tuple[int, int] = (9, 0),
                 script: str = "train_gpt.py") -> None:  # fmt: skip
        self.capacity, self.script = capacity, script
        self.blocks: weakref.WeakKeyDictionary[Any, Block] = weakref.WeakKeyDictionary()
        self.pinned: weakref.WeakSet = weakref.WeakSet()
        self.unread: weakref.WeakKeyDictionary[Any, tuple[Stream, int]] = weakref.WeakKeyDictionary()
        self.live = self.peak = self.launches = self.out_of_memory = 0
        self.syncs: Counter[str] = Counter()
        self.late: dict[str, int] = {}
        self.ops: Counter[tuple] = Counter()
        self.faults: list[str] = []
        self.default = self.stream = Stream()
        self.host: Counter = Counter()
        self.setting = False  # x[i] = a number: a fill on CUDA, a copy on the CPU
        self.inside: list[bool] = []  # for each Python call under way: does it compute on the GPU
        properties = mock.Mock(
            total_memory=min(capacity, 80 * 2**30), multi_processor_count=132, major=capability[0], minor=capability[1]
        )
        properties.name = name
        real_init = dist.init_process_group
        cuda = {
            "is_available": lambda: True, "device_count": lambda: 8, "current_device": lambda: 0, "set_device": lambda _: None,
            "get_device_name": lambda *_: name, "get_device_capability": lambda *_: capability, "empty_cache": lambda: None,
            "get_device_properties": lambda *_: properties, "is_bf16_supported": lambda *_: True, "init": lambda: None,
            "max_memory_allocated": lambda *_: self.peak, "memory_allocated": lambda *_: self.live, "Stream": Stream, "Event": Event,
            "reset_peak_memory_stats": lambda *_: setattr(self, "peak", self.live), "synchronize": lambda *_: self.synchronize(),
            "mem_get_info": lambda *_: (int(min(capacity, 80 * 2**30)) - self.live, int(min(capacity, 80 * 2**30))),
            "memory_reserved": lambda *_: self.live, "current_stream": lambda *_: self.stream, "default_stream": lambda *_: self.default, "stream": self.use_stream,
        }  # fmt: skip
        self.patches = [mock.patch.object(torch.cuda, k, v) for k, v in cuda.items()]
        self.patches += [
            mock.patch.object(torch, "Generator", PretendGenerator),
            mock.patch.object(torch, "compile", lambda model=None, **_: model),
            mock.patch.object(
                Tensor, "record_stream", lambda x, stream: self.blocks[x.untyped_storage()].recorded.add(stream)
            ),
            mock.patch.object(
                dist,
                "init_process_group",
                lambda *a, device_id=None, **k: real_init("gloo", *a[1:], **k),  # noqa: ARG005
            ),
        ]
        self.modes = [Functions(self), Kernels(self)]

    def __enter__(self) -> FakeCuda:
        FakeCuda.now = self
        for part in (*self.patches, *self.modes):
            part.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for part in (*self.modes[::-1], *self.patches[::-1]):
            part.__exit__(*error)

    # ---- where things lie

    @staticmethod
    def own(device: Any) -> torch.device:
        """The device that is meant; a GPU of another rank is a mistake."""
        device = torch.device(device)
        if device.type == "cuda" and device.index not in (None, GPU.index):
            raise DeviceMismatch(f"{device} is another rank's GPU, this rank has {GPU}")
        return device

    def on(self, t: Any) -> bool:
        """Whether a tensor lies on the pretend GPU."""
        return (
            isinstance(t, Tensor)
            and t.device.type == "cpu"
            and t.layout == torch.strided
            and t.untyped_storage() in self.blocks
        )

    def place(self, out: Any) -> Any:
        """Tag everything in `out`."""
        for t in tensors_in(out):
            if t.device.type == "cpu" and not self.on(t):
                storage = t.untyped_storage()
                if self.live + storage.nbytes() > self.capacity:
                    self.out_of_memory += 1
                    raise torch.OutOfMemoryError(
                        f"pretend CUDA out of memory: {storage.nbytes()} bytes beside {self.live}"
                    )
                self.blocks[storage] = Block(self, storage.nbytes())
        return out

    def moved(self, x: Tensor, to_gpu: bool) -> Tensor:
        """A copy on the other device; who calls it counts whether the host waits."""
        self.stream.time += 1
        self.stream.seen |= self.host
        with torch.utils._python_dispatch._disable_current_modes():
            y = x.detach().clone()
        return self.place(y) if to_gpu else y

    # ---- accounts

    def line(self) -> str:
        """The innermost line of the script."""
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.endswith(self.script):
            frame = frame.f_back
        return "outside" if frame is None else f"{frame.f_code.co_name}:{frame.f_lineno}"

    def fault(self, text: str) -> None:
        self.faults.append(f"{text} (near {self.line()})")

    def wait(self, what: str, t: Tensor | None = None) -> None:
        """The host waits for all work that the current stream has, also for what came after `t` was written."""
        key = f"{what} {self.line()}"
        self.syncs[key] += 1
        block = self.blocks.get(t.untyped_storage()) if t is not None and self.on(t) else None
        if block and block.written[0] is self.stream:
            self.late[key] = max(self.late.get(key, 0), self.stream.time - block.written[1])
        self.stream.synchronize()

    def synchronize(self) -> None:
        self.syncs[f"synchronize {self.line()}"] += 1
        for stream in {self.default, self.stream, *(s for b in self.blocks.values() for s in b.used)}:
            stream.synchronize()

    @contextlib.contextmanager
    def use_stream(self, stream: Stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def note(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Account for one kernel: launches, waits, order between streams."""
        if func.is_view:
            return
        (name, names, writes), stream = schema_of(func), self.stream
        name = name.partition("::")[2]
        self.launches += 1
        stream.time += 1
        stream.seen |= self.host
        named = dict(zip(names, args, strict=False)) | kwargs
        for key, value in [*named.items(), ("", out)]:
            for t in tensors_in(value):
                block = self.blocks.get(t.untyped_storage()) if self.on(t) else None
                if block is None:
                    continue
                writing = key in writes or key == ""
                befores = [block.written, *(block.used.items() if writing else ())]
                for other, time in befores:
                    if other is not stream and stream.seen[other] < time:
                        self.fault(f"{name}: a stream works on a tensor that another stream still works on")
                block.used[stream] = stream.time
                if writing:
                    block.written = (stream, stream.time)
        if name in WAITS or (
            name in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        ):
            self.wait(name)


class Kernels(TorchDispatchMode):
    """Every kernel, also those of C++ and of the backward pass."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        gpu, kwargs = self.gpu, kwargs or {}
        tensors = tensors_in(args, kwargs)
        on = [gpu.on(t) for t in tensors]
        for t in tensors if gpu.unread else ():
            self.read(t)
        if func.namespace == "c10d":
            self.check_nccl(func, tensors, on)
        if not any(on):
            # A kernel's own helpers, made by C++ with the options of its arguments.
            helper = not tensors and gpu.inside and gpu.inside[-1]
            out = func(*args, **kwargs)
            return gpu.place(out) if helper else out
        copies = schema_of(func)[0] in ("aten::copy_", "aten::_foreach_copy_", "aten::_copy_from")
        if not all(on) and func.namespace != "c10d":
            self.check(func, args, kwargs, copies)
        gpu.ops[schema_of(func)[0], tuple(str(t.dtype)[6:] for t in tensors[:4])] += 1
        out = computed(func, args, kwargs)
        gpu.place(out if not copies else ())
        gpu.note(func, args, kwargs, out)
        if copies and not all(on) and not (len(args) > 2 and args[2]) and not gpu.setting:
            gpu.wait("copy_")
        return out

    def read(self, t: Tensor) -> None:
        made = (
            self.gpu.unread.get(t.untyped_storage()) if t.device.type == "cpu" and t.layout == torch.strided else None
        )
        if made and self.gpu.host[made[0]] < made[1]:
            self.gpu.fault("a copy to the CPU that does not block is read without waiting for it")

    def check_nccl(self, func: Any, tensors: list[Tensor], on: list[bool]) -> None:
        if not all(on):
            raise DeviceMismatch(f"{func}: NCCL takes CUDA tensors alone")
        if not all(t.is_contiguous() for t in tensors):
            raise DeviceMismatch(f"{func}: NCCL takes contiguous tensors alone")

    def check(self, func: Any, args: tuple, kwargs: dict, copies: bool) -> None:
        on, name = self.gpu.on, schema_of(func)[0].partition("::")[2]
        if copies:
            return
        refused = DeviceMismatch(f"{func}: expected all tensors on one device, found " + ", ".join(
            f"{'cuda' if on(t) else 'cpu'}{list(t.shape)}" for t in tensors_in(args, kwargs)))  # fmt: skip
        if name in INDEXED:
            where, values = on(args[0]), [t for t in args[2:3] if isinstance(t, Tensor)]
            if (not where and any(on(i) for i in args[1] if i is not None)) or any(
                on(v) != where and (v.dim() or on(v)) for v in values
            ):
                raise refused
            if where and any(not on(i) for i in args[1] if i is not None):
                self.gpu.wait("index on the CPU")
            return
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
        if name.startswith(("_foreach", "_fused")):
            single = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            for row in zip(*(x for x in lists if len(x) == len(lists[0])), strict=True):
                if len({on(t) for t in row}) > 1 or any(on(t) != on(row[0]) and (t.dim() or on(t)) for t in single):
                    raise refused
            return
        scalar = torch.Tag.pointwise in func.tags or name in SCALARS
        others = [t for t in tensors_in(args, kwargs) if not on(t)]
        if not scalar or any(t.dim() for t in others) or func._schema.is_mutable and not on(args[0]):
            raise refused


class Functions(TorchFunctionMode):
    """Every call from Python: what tells or changes the device."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        gpu, kwargs = self.gpu, dict(kwargs or {})
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        if name == "__get__":
            prop = getattr(func.__self__, "__name__", "")
            if prop in ("device", "is_cuda", "is_cpu") and gpu.on(first):
                return {"device": GPU, "is_cuda": True, "is_cpu": False}[prop]
            return func(*args, **kwargs)
        special = getattr(self, f"call_{name}", None)
        if special is not None and isinstance(first, Tensor) and getattr(Tensor, name, None) is func:
            return special(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None:
            device = self.gpu.own(device)
            if device.type == "cuda":
                kwargs["device"] = CPU
        if name == "as_tensor" and isinstance(first, Tensor) and device is not None:
            return self.call_to(first, device, **{k: v for k, v in kwargs.items() if k == "dtype"})
        generator = kwargs.get("generator")
        on = any(gpu.on(t) for t in tensors_in(args, kwargs))
        if generator is not None:
            target = device.type == "cuda" if device is not None else on
            if target != (generator.device.type == "cuda"):
                raise DeviceMismatch(f"{name}: the generator lies on {generator.device}, the tensor does not")
        gpu.inside.append(on if device is None else device.type == "cuda")
        gpu.setting = name == "__setitem__" and not isinstance(args[2], Tensor)
        try:
            out = func(*args, **kwargs)
        finally:
            gpu.inside.pop()
            gpu.setting = False
        if device is not None and device.type == "cuda":
            fresh = out
            gpu.place(fresh)
            if name in ("tensor", "as_tensor"):
                gpu.syncs[f"tensor from Python {gpu.line()}"] += 1
        elif device is not None and device.type == "cpu" and on:
            for t in tensors_in(out):
                gpu.blocks.pop(t.untyped_storage(), None)
        return out

    # ---- methods of Tensor that differ

    def call_to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, rest = kwargs.pop("device", None), kwargs.pop("dtype", None), list(args)
        non_blocking, copy = kwargs.pop("non_blocking", False), kwargs.pop("copy", False)
        other = kwargs.pop("other", rest[0] if rest and isinstance(rest[0], Tensor) else None)
        if other is not None:
            device, dtype, rest = GPU if self.gpu.on(other) else other.device, other.dtype, rest[1:]
        elif rest and isinstance(rest[0], torch.dtype):
            dtype, rest = rest[0], rest[1:]
        elif rest:
            device, rest = rest[0], rest[1:]
            if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
                dtype, rest = rest[0], rest[1:]
        non_blocking, copy = [*rest, *[non_blocking, copy][len(rest) :]]
        dtype, here = dtype or x.dtype, self.gpu.on(x)
        device = self.gpu.own(device) if device is not None else GPU if here else x.device
        if device.type not in ("cuda", "cpu") or x.device.type != "cpu":
            return x.to(device, dtype, copy=copy, **kwargs)
        if here == (device.type == "cuda"):
            return x.to(dtype, copy=copy, **kwargs)
        source = x
        if here:  # CUDA converts first
            x = x.to(dtype)
        y = Move.apply(x, not here)
        if not here:
            if not (non_blocking and x.untyped_storage() in self.gpu.pinned):
                self.gpu.syncs[f"to cuda {self.gpu.line()}"] += 1
            y = y.to(dtype)
        elif non_blocking:
            self.gpu.unread[y.untyped_storage()] = (self.gpu.stream, self.gpu.stream.time)
        else:
            self.gpu.wait("to cpu", source)
        return y

    def call_cpu(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.call_to(x, CPU)

    def call_cuda(self, x: Tensor, _device: Any = None, non_blocking: bool = False, **__: Any) -> Tensor:
        return self.call_to(x, GPU, non_blocking=non_blocking)

    def call_new_tensor(
        self, x: Tensor, data: Any, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
    ) -> Tensor:
        y = x.new_tensor(data, dtype=dtype, device=CPU, **kwargs)
        return self.call_to(y, device if device is not None else GPU if self.gpu.on(x) else CPU)

    def call_numpy(self, x: Tensor, **kwargs: Any) -> Any:
        if self.gpu.on(x):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        self.gpu.modes[1].read(x)
        return x.numpy(**kwargs)

    def call___array__(self, x: Tensor, dtype: Any = None) -> Any:
        array = self.call_numpy(x.detach() if not x.requires_grad else x)
        return array if dtype is None else array.astype(dtype, copy=False)

    def call_tolist(self, x: Tensor) -> Any:
        if self.gpu.on(x):
            self.gpu.wait("tolist", x)
        else:
            self.gpu.modes[1].read(x)
        return x.tolist()

    def call_pin_memory(self, x: Tensor, *_: Any) -> Tensor:
        if self.gpu.on(x):
            raise RuntimeError("cannot pin 'torch.cuda' tensors, only dense CPU tensors can be pinned")
        y = x.clone()
        self.gpu.pinned.add(y.untyped_storage())
        return y

    def call___deepcopy__(self, x: Tensor, memo: dict) -> Tensor:
        y = x.__deepcopy__(memo)
        return self.gpu.place(y) if self.gpu.on(x) else y

    def call_copy_(self, x: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
        out = x.copy_(src, non_blocking)
        if non_blocking and self.gpu.on(src) and not self.gpu.on(x):
            self.gpu.unread[x.untyped_storage()] = (self.gpu.stream, self.gpu.stream.time)
        return out


def main() -> int:
    """The script under CUDA's rules, as a process of its own."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import train_gpt

    with FakeCuda() as gpu:
        status = train_gpt.main([], os.environ)
    print(*gpu.faults, f"{gpu.launches} kernels", sep="\n", file=sys.stderr)
    return status or 3 * bool(gpu.faults)


if __name__ == "__main__":
    sys.exit(main())
