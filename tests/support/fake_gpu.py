"""A device `cuda` without a GPU: shapes, types and devices are checked, nothing is computed.

Tensors on `cuda` are torch's FakeTensors, which have no values. Tensors on the CPU are ordinary
ones. So an operation that mixes both raises, as on a GPU, and so does what makes the host wait for
the GPU: reading a value, a shape that depends on values, a copy that is not asynchronous.

A test with `@on_fake_gpu` runs in a process of its own, since torch has to be told that there is a
GPU before its first backward pass. See docs/contributing.md.
"""

import ctypes
import functools
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from carryon.cache.base.model import Base
from carryon.tools.bench.processes import processes

CUDA = torch.device("cuda", 0)
_SOURCE = Path(__file__).with_suffix(".cpp")
_ROOT = Path(__file__).parents[2]
_COPIES = {"_to_copy", "copy_", "copy", "_pin_memory", "is_pinned"}
_READS = {"_local_scalar_dense", "equal", "is_nonzero"}
_SHAPES = {
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave.Tensor",
    "bincount",
}
_LONGEST_S = 300
_is_child = False


class HostWaitError(AssertionError):
    """The host would wait for the GPU."""


class FakeGpu(TorchDispatchMode):
    """Runs operations on `cuda` on FakeTensors, all others as they are, and counts waits."""

    def __init__(self) -> None:
        """Allow no wait."""
        super().__init__()
        self.waits: list[str] = []
        """Where the host waited and was allowed to, `file.py:function`, in order."""
        self._allowed: list[str] = []
        self._allows_all = False
        self._pinned = WeakTensorKeyDictionary()

    @contextmanager
    def setup(self) -> Iterator[None]:
        """Let the host wait within the block, uncounted: for what happens once a run."""
        before, self._allows_all = self._allows_all, True
        try:
            yield
        finally:
            self._allows_all = before

    @contextmanager
    def allowing(self, *places: str) -> Iterator[None]:
        """Let the host wait at `file.py:function` within the block."""
        before, self._allowed = self._allowed, [*self._allowed, *places]
        try:
            yield
        finally:
            self._allowed = before

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run one operation."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and _is_made_of_others(func):
            with self:  # outside of inference mode these come one by one
                return func.decompose(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        name = func._schema.name.removeprefix("aten::")
        if name in ("_pin_memory", "is_pinned"):
            return self._pin(name, args[0])
        on_gpu = any(map(_is_on_gpu, leaves))
        device = kwargs.get("device")
        if kwargs.get("pin_memory") and not on_gpu:
            with unset_fake_temporarily():
                made: Tensor = func(*args, **{**kwargs, "pin_memory": False})
            self._pinned[made] = True
            return made
        if not on_gpu and (device is None or torch.device(device).type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            return self._copy(func, name, args, kwargs)
        if name in _READS:
            self._wait(f"{name} reads a value")
            is_number = name == "_local_scalar_dense" and args[0].dtype != torch.bool
            return 1.0 if is_number and args[0].is_floating_point() else int(is_number)
        overload = f"{name}.{func._overloadname}"
        if name in _SHAPES or overload in _SHAPES:
            raise HostWaitError(f"{overload} has a shape that depends on values, at {_place()}")
        if name.startswith("index") and any(map(_is_rows, leaves)):
            raise HostWaitError(f"{overload} with indices of the CPU, at {_place()}")
        return func(*args, **kwargs)

    def _pin(self, name: str, tensor: Tensor) -> Any:  # noqa: ANN401
        if name == "is_pinned":
            return tensor in self._pinned
        assert not _is_on_gpu(tensor), f"pin_memory of a tensor on the GPU, at {_place()}"
        with unset_fake_temporarily():
            copy = tensor.clone()
        self._pinned[copy] = True
        return copy

    def _copy(
        self,
        func: Any,  # noqa: ANN401
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        if name == "copy_":
            to, source = args[0].device, args[1]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            source = args[0]
            to = torch.device(kwargs.get("device") or source.device)
            waits = not kwargs.get("non_blocking", False)
        if not _is_on_gpu(source) and to.type == "cuda":
            if waits or source not in self._pinned:
                self._wait("a copy to the GPU is not asynchronous from pinned memory")
            source = self._uploaded(source)
            if name == "copy_":
                return func(args[0], source)  # type: ignore[no-any-return]
            return func(source, **{**kwargs, "device": to})  # type: ignore[no-any-return]
        if _is_on_gpu(source) and to.type == "cpu":
            if waits or name != "copy_" or not self._is_pinned(args[0]):
                self._wait("a copy to the host")
            dtype = kwargs.get("dtype") or source.dtype
            with unset_fake_temporarily():
                values = torch.ones(source.shape, dtype=dtype)
                return args[0].copy_(values) if name == "copy_" else values
        return func(*args, **kwargs)  # type: ignore[no-any-return]

    def _is_pinned(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in pinned memory, or a part of one that is."""
        memory = tensor.untyped_storage().data_ptr()
        return any(each.untyped_storage().data_ptr() == memory for each in self._pinned)

    def _uploaded(self, source: Tensor) -> Tensor:
        return torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device=CUDA)

    def _wait(self, what: str) -> None:
        if self._allows_all:
            return
        place = _place()
        if place not in self._allowed:
            raise HostWaitError(f"{what}, at {place}")
        self.waits.append(place)


def move_base(base: Base) -> Base:
    """Return a base whose weights are on the GPU; loading it there would need a real one."""
    base.model.to(CUDA)  # type: ignore[arg-type]
    return replace(base, device=CUDA)


def _is_made_of_others(func: Any) -> bool:  # noqa: ANN401
    key = "CompositeImplicitAutograd"
    name = func.name()
    return name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _is_on_gpu(value: object) -> bool:
    return isinstance(value, FakeTensor) and value.device.type == "cuda"


def _is_rows(value: object) -> bool:
    """Return whether a value is a tensor of the CPU that is more than a number."""
    return isinstance(value, Tensor) and not _is_on_gpu(value) and value.ndim > 0


def _place() -> str:
    """Return the innermost function of the package that is running, as `file.py:function`."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename).resolve()
        if frame.name == "to_device":  # who called it tells more
            continue
        if any(path.is_relative_to(_ROOT / name) for name in ("cache", "train")):
            return f"{path.name}:{frame.name}"
    return "outside of the package"


@functools.cache
def _library() -> tuple[Path, str]:
    """Compile fake_gpu.cpp, once a session; returns the library, and what the compiler refused."""
    torch_folder = Path(torch.__file__).parent
    folder = tempfile.mkdtemp(prefix="fake-gpu-", dir=os.environ["CARRYON_CACHE"])  # of the tests
    library = Path(folder, "fake_gpu.so")
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-w", f"-I{torch_folder / 'include'}"]
    command += [str(_SOURCE), "-o", str(library)]
    command += [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return library, done.stderr if done.returncode else ""


def on_fake_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a process with a fake GPU; the process of the tests has none.

    The test's argument `gpu` is the FakeGpu; its other arguments have to be picklable.
    """
    if _is_child:
        return test

    @pytest.mark.skipif(sys.platform != "linux", reason="fake_gpu.cpp is built for Linux")
    @pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has CUDA")
    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to stand in for a GPU")
    @functools.wraps(test)
    def run(**kwargs: Any) -> None:  # noqa: ANN401
        worker = _worker()
        worker.talk.send((test.__code__.co_filename, test.__name__, kwargs))
        if not worker.talk.poll(_LONGEST_S):
            worker.process.kill()
        try:
            failure = worker.talk.recv()
        except EOFError:
            _worker.cache_clear()
            failure = "the process was killed, or did not end in time"
        if failure:
            pytest.fail(failure, pytrace=False)

    parameters = inspect.signature(test).parameters.values()
    own = [each for each in parameters if each.name != "gpu"]
    run.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    return run


@dataclass(frozen=True, kw_only=True, slots=True)
class _Worker:
    """The process with a fake GPU, where tests run one after another."""

    process: Any
    talk: Connection


@functools.cache
def _worker() -> _Worker:
    library, problem = _library()
    if problem:  # no skip: a new torch would end all these tests without a word
        pytest.fail(f"fake_gpu.cpp does not fit torch {torch.__version__}: {problem[:1000]}", False)
    ours, theirs = processes().Pipe()
    process = processes().Process(target=_run_tests, args=(library, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process=process, talk=ours)


def _run_tests(library: Path, talk: Connection) -> None:
    global _is_child
    _is_child = True
    torch.set_num_threads(1)
    while True:
        file, name, kwargs = talk.recv()
        try:
            module = _imported(file)
            with fake_gpu(library) as gpu, warnings.catch_warnings():
                warnings.simplefilter("error")
                # safetensors looks for shared memory, of which a FakeTensor has none
                warnings.filterwarnings("ignore", message="Accessing the data pointer")
                getattr(module, name)(gpu=gpu, **kwargs)
            talk.send("")
        except BaseException:
            talk.send(traceback.format_exc())


@functools.cache
def _imported(file: str) -> Any:  # noqa: ANN401
    spec = importlib.util.spec_from_file_location(f"on_fake_gpu_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def fake_gpu(library: Path) -> Iterator[FakeGpu]:
    """Let there be a fake GPU in this process; it stays known to torch after the block."""
    ctypes.CDLL(str(library)).claim_gpu()
    # Modules move by new parameters: a FakeTensor cannot take the place of a tensor's data.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda state, device="cuda": None
    gpu = FakeGpu()

    class Event:
        """An event of a stream, for which the host waits."""

        def record(self, stream: object = None) -> None:
            """Do nothing: nothing is computed."""

        def synchronize(self) -> None:
            """Count a wait."""
            gpu._wait("an event")

    class Stream:
        """A stream, on which copies run."""

        def __init__(self, device: object = None) -> None:
            """Do nothing: nothing is computed."""

        def wait_stream(self, stream: object) -> None:
            """Do nothing: the host does not wait."""

    torch.cuda.Event, torch.cuda.Stream = Event, Stream
    torch.cuda.current_stream = lambda device=None: Stream()
    torch.cuda.stream = lambda stream: nullcontext()
    with ExitStack() as modes:
        modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        modes.enter_context(gpu)
        yield gpu
