"""Choice of device and of matrix product dtype, and hints to the C allocator.

What multiplies faster is measured, as equal names of hardware do not mean equal speeds. The times
differ several times, so that equal machines choose alike.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.cache.timing import least_seconds

DEFAULT_CHUNK = 2048
"""Positions of a chunk of the loss: a CPU's kernel is a quarter slower at 1,024, half as fast at
512, and keeps the logits of a few hundred at a time; on an accelerator their logits fit."""
HEAD_DTYPES = ("bfloat16", "float32")
"""In which the head, and the carry-on below it, can be multiplied."""
_CPU_ROWS = 256
_MMAP_THRESHOLD = -3  # as malloc.h has it
_TRIM_THRESHOLD = -1


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` takes an accelerator where there is one.

    Raises:
        InputError: this machine has no such device.
    """
    if name == "auto":
        from accelerate import PartialState

        default: torch.device = PartialState().device
        return default
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device: expected one of this machine, got {name!r}: {reason}") from error
    return device


def device_of(name: str, number: int) -> str:
    """Return the device of one of several processes: `auto` deals out those of this machine.

    Unlike `pick_device` this joins no other process.

    Args:
        name: as of `pick_device`; `auto` and a kind without a number, such as `cuda`, are dealt.
        number: of the process, counted from 0.
    """
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or name not in ("auto", kind.type):
        return "cpu" if name == "auto" else name
    return f"{kind.type}:{number % torch.accelerator.device_count()}"


def count_cores() -> int:
    """Return the cores that this process may use, or its share of them beside those of torchrun."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def pick_head_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type of the head's products; `auto`: bfloat16 where that is faster on `device`."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def pick_chunk(chunk_tokens: int) -> int:
    """Return the positions of a chunk of the loss; 0: DEFAULT_CHUNK."""
    return chunk_tokens or DEFAULT_CHUNK


def rows_at_once(num_rows: int, device: torch.device) -> int:
    """Return how many of `num_rows` rows of states to widen at one time, at least 1.

    A CPU takes a few, so that the copies stay in its cache. On an accelerator many small kernels
    take longer than one large one, and the copies are small beside the logits of a chunk.
    """
    return _CPU_ROWS if device.type == "cpu" else max(1, min(num_rows, 2 * DEFAULT_CHUNK))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`; a GPU copies it from pinned memory while the host goes ahead.

    A copy from other memory waits until the GPU has done all that it was told to do before.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor to the host, under way; a GPU and the host go ahead until it is read."""

    def __init__(self, tensor: Tensor) -> None:
        """Begin to copy; `tensor` may be freed afterwards."""
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._copy = tensor.cpu()
            return
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copy.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # The current stream of another GPU than the current one is not that of the event.
        self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """Return the copy, on the host, once it is whole."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


class SideCopy:
    """Copies of tensors of a GPU into pinned memory, under way on a stream beside its own.

    The GPU computes on while they run, and the host does not wait. Any thread may wait for them.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], streams: "SideStreams") -> None:
        """Begin to copy.

        Args:
            pairs: where to, in pinned memory, and from where; one from elsewhere than a GPU is
                whole at once.
            streams: of this process.
        """
        self._sources = [source for _, source in pairs]  # memory in use until the copy is whole
        self._events: list[torch.cuda.Event] = []
        for device in {source.device for source in self._sources}:
            own = [pair for pair in pairs if pair[1].device == device]
            if device.type != "cuda":
                for to, source in own:
                    to.copy_(source)
                continue
            stream = streams.of(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for to, source in own:
                    to.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            self._events.append(event)

    def wait(self) -> None:
        """Wait until they are whole."""
        for event in self._events:
            event.synchronize()
        self._sources = []


class SideStreams:
    """A stream for copies on each GPU that is in use, made when it is needed first."""

    def __init__(self) -> None:
        """Begin without a stream."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream of a device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


@contextmanager
def attention_of_any_shape() -> Iterator[None]:
    """Leave cuDNN's kernels out of torch's attention.

    They are torch's first choice on some GPUs, but are compiled again for each number of rows and
    tokens: about 0.1 s, where a batch of mixed lengths takes a few milliseconds.
    """
    before: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether `device` multiplies bfloat16 faster than float32.

    Timed once a process, some tens of milliseconds: on a device with units for it bfloat16 is
    several times as fast, on one that emulates it several times as slow.
    """
    is_cpu = device.type == "cpu"
    rows, width = (128, 1024) if is_cpu else (4096, 4096)

    def multiply(states: Tensor, weight: Tensor) -> None:
        torch.nn.functional.linear(states, weight)
        if not is_cpu:
            torch.accelerator.synchronize(device)

    calls = {}
    try:
        for dtype in (torch.float32, torch.bfloat16):
            matrices = (torch.ones(size, width, dtype=dtype) for size in (rows, width))
            call = partial(multiply, *(matrix.to(device) for matrix in matrices))
            call()  # libraries are loaded, and kernels made
            calls[str(dtype)] = call
    except (RuntimeError, NotImplementedError):  # it has no such kernels
        return False
    seconds = least_seconds(calls, num_threads=torch.get_num_threads())
    return seconds["torch.bfloat16"] < seconds["torch.float32"]


def reuse_freed_memory() -> None:
    """Let glibc keep up to 64 MB of freed memory instead of returning it at once.

    Returned memory costs page faults when it is needed again: 27,000 of them, a fifth of the time,
    in one call of the loss. glibc raises its thresholds, up to 32 MB, when it frees a mapped block.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def return_freed_memory() -> None:
    """Let glibc return freed blocks of 1 MB or more at once; by default it keeps up to 32 MB."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 20)


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Let glibc return freed blocks of 1 MB or more at once, until the block ends.

    Each weight that is converted leaves one, and each that is quantized several; kept, they were
    more than the quantized base. Afterwards glibc keeps freed blocks as it does once one of 32 MB
    was freed.
    """
    return_freed_memory()
    try:
        yield
    finally:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, 32 << 20)
            mallopt(_TRIM_THRESHOLD, 64 << 20)


def return_small_memory() -> None:
    """Let glibc return free memory between small blocks: 50 MB after a step."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
