"""TensorTracker: bytes of all live tensors by class, FLOPs and values that the code reads.

The tracker sees each operation of torch (a TorchDispatchMode). A storage is counted from the
operation that creates it until it is freed. Storages get the class of the phase in which they were
created, and parameters, gradients and optimizer states are labeled afterwards.

torch's own `torch.distributed._tools.MemTracker` raises when a module is called twice, as with
gradient accumulation. A test compares both in one step.
"""

import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from ravine.errors import UsageError

aten = torch.ops.aten
CLASSES = (
    *("parameters", "buffers", "gradients", "optimizer state", "copies", "weight casts"),
    *("activations", "temporary", "batch", "data"),
)
PHASE_CLASSES = {"setup": "copies", "forward": "activations", "backward": "temporary"}
PHASE_CLASSES |= {"step": "temporary", "data": "data"}
# torch's registry lacks the attention kernel of the CPU, whose arguments are in the same order
FLOP_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
# bytes that a kernel of the CPU allocates and frees inside, by its arguments
WORKSPACES: dict[Any, Any] = {
    # sorted indices, their order and the bag of each, all int64 (n)
    aten._embedding_bag_dense_backward.default: lambda grad, indices, *_: 24 * indices.numel(),
}
VALUE_READS = (aten._local_scalar_dense.default, aten.item.default)
TORCH_FOLDER = str(Path(str(torch.__file__)).parent)
# decides by values how often it computes the loss, and what its state is
LBFGS_FILE = str(Path(torch.optim.__file__).parent / "lbfgs.py")
# code of Lightning and Ravine that reads values gets 1.0 or true
FOLDERS_WITH_DEFAULTS = (
    str(Path(str(lightning.__file__)).parent),
    *(str(Path(__file__).parents[2] / name) for name in ("ravine", "callbacks", "strategies")),
    *(str(Path(__file__).parents[2] / name) for name in ("cli", "datamodules")),
    str(Path(__file__).parents[2] / "lightning_modules"),
)


class Moment(NamedTuple):
    """The bytes of live tensors at one moment, by class in the order of CLASSES.

    Of the activations, `in_blocks` were created in the forward pass of a block, and `split` of
    these between matrices that tensor parallelism splits.
    """

    phase: str
    num_bytes: tuple[int, ...]
    in_blocks: int = 0
    split: int = 0

    def of(self, name: str) -> int:
        """Return the bytes of one class."""
        return self.num_bytes[CLASSES.index(name)]

    @property
    def total(self) -> int:
        """Return the bytes of all classes."""
        return sum(self.num_bytes)


class Mark(NamedTuple):
    """The start of a pass through a block: forward or backward, the block, and the next moment.

    `end` and `backward end` are the ends of the passes through all blocks.
    """

    kind: str
    block: int
    moment: int


class Operation(NamedTuple):
    """One operation that computes: name, phase, FLOPs, and bytes of its inputs and outputs.

    `count` is how often it runs; in an extrapolated step it can be negative (equal_blocks.py).
    """

    name: str
    phase: str
    flops: int
    num_bytes: int
    count: int = 1


class TensorTracker(TorchDispatchMode):
    """Counts the bytes of live tensors by class, while it is active.

    Attributes:
        phase: setup, data, forward, backward or step; set by the code that runs them.
        is_in_block: whether the forward pass of a block runs.
        is_split: whether it is between matrices that tensor parallelism splits.
        marks: the passes through blocks since `start_recording`.
        moments: the local maxima of the bytes since `start_recording`.
        operations: what was computed since `start_recording`.
    """

    def __init__(self) -> None:
        """Start without tensors."""
        super().__init__()
        self.phase = "setup"
        self.is_recording = False
        self.moments: list[Moment] = []
        self.operations: list[Operation] = []
        self.marks: list[Mark] = []
        self.is_in_block = self.is_split = False
        self._bytes = [0] * len(CLASSES)
        self._kind_bytes = [0, 0]  # of activations: in blocks, and split
        # by the address of the storage: class, bytes, the kinds it belongs to, the weak reference
        self._storages: dict[int, tuple[int, int, tuple[int, ...], Any]] = {}
        self._may_replace_last = False  # whether no tensor was freed since the last moment

    def start_recording(self) -> None:
        """Record moments and operations from now on."""
        self.is_recording, self._may_replace_last = True, False
        self.moments, self.operations, self.marks = [self.now()], [], []

    def now(self) -> Moment:
        """Return the bytes of live tensors."""
        return Moment(self.phase, tuple(self._bytes), *self._kind_bytes)

    def mark(self, kind: str, block: int) -> None:
        """Record that a pass through a block begins or ends here."""
        if kind == "backward":  # a recomputation may end between split matrices
            self.is_split = False
        if self.is_recording:
            self.marks.append(Mark(kind, block, len(self.moments)))
            self.moments.append(self.now())
            self._may_replace_last = False

    def label(self, tensors: Iterable[Any], name: str, adds: bool = True) -> None:
        """Set the class of the storages of some tensors.

        Args:
            tensors: objects that are no tensors are ignored.
            name: one of CLASSES.
            adds: whether storages that the tracker has not seen are added.
        """
        for tensor in tensors:
            if isinstance(tensor, Tensor) and (adds or self.class_of(tensor) is not None):
                self._add(tensor, CLASSES.index(name), relabel=True)

    def class_of(self, tensor: Tensor) -> str | None:
        """Return the class of a tensor's storage; None if it was never seen."""
        entry = self._storages.get(tensor.untyped_storage()._cdata)
        return None if entry is None else CLASSES[entry[0]]

    def _add(self, tensor: Tensor, index: int, relabel: bool = False) -> bool:
        """Count a tensor's storage; return whether it is new."""
        if tensor.layout != torch.strided:
            return any([self._add(t, index, relabel) for t in _dense_tensors(tensor)])
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a subclass without a storage
            return False
        key, size = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is not None:
            if relabel and known[0] != index:
                self._count(known[0], known[2], -known[1])
                self._count(index, (), known[1])
                self._storages[key] = (index, known[1], (), known[3])
            return False
        if not isinstance(tensor, FakeTensor) and (tensor.is_meta or not storage.resizable()):
            return False  # no memory, or memory that torch did not allocate: a mapped file, numpy
        reference = weakref.ref(storage, lambda _: self._free(key))
        kinds: tuple[int, ...] = ()
        if CLASSES[index] == "activations" and (self.is_in_block or self._is_recomputing()):
            kinds = (0, 1) if self.is_split else (0,)
        self._storages[key] = (index, size, kinds, reference)
        self._count(index, kinds, size)
        return True

    def _is_recomputing(self) -> bool:
        """Whether activation checkpointing computes a block again: only then a graph is built."""
        return self.phase == "backward" and torch.is_grad_enabled()

    def _count(self, index: int, kinds: tuple[int, ...], size: int) -> None:
        self._bytes[index] += size
        for kind in kinds:
            self._kind_bytes[kind] += size

    def _free(self, key: int) -> None:
        index, size, kinds, _ = self._storages.pop(key)
        self._count(index, kinds, -size)
        self._may_replace_last = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operation of torch, and count its results.

        torch calls this method in place of each operation while the tracker is active.
        """
        kwargs = kwargs or {}
        if function in VALUE_READS and isinstance(args[0], FakeTensor):
            return _default_value(function, args[0])
        if function is aten.index.Tensor or function is aten.index_put_.default:
            args = _with_index_numbers(args)
        try:
            output = function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise value_error(function) from error
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        index = self._class_of_results(function, args, results)
        is_new = False
        for result in results:
            is_new |= self._add(result, index)
        if self.is_recording:
            self._record(function, args, kwargs, output, results, is_new)
        return output

    def _class_of_results(self, function: Any, args: Any, results: list[Tensor]) -> int:
        """Return the class of new results: that of the phase, or `weight casts`."""
        name = "activations" if self._is_recomputing() else PHASE_CLASSES[self.phase]
        if function is aten._to_copy.default and self.phase == "forward":
            source = args[0]
            is_parameter = self.class_of(source) == "parameters"
            if is_parameter and results[0].numel() == source.numel():
                name = "weight casts"
        return CLASSES.index(name)

    def _record(
        self, function: Any, args: Any, kwargs: Any, output: Any, results: Any, is_new: bool
    ) -> None:
        if not (is_new or function._schema.is_mutable):
            return  # a view
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        num_bytes = sum(_num_bytes(tensor) for tensor in (*inputs, *results))
        formula = FLOP_FORMULAS.get(function._overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=output)
        self.operations.append(Operation(str(function), self.phase, flops, num_bytes))
        if is_new:
            if self._may_replace_last:  # a higher moment of the same rise
                self.moments[-1] = self.now()
            else:
                self.moments.append(self.now())
            self._may_replace_last = True
        if function in WORKSPACES:
            index, workspace = CLASSES.index("temporary"), WORKSPACES[function](*args)
            self._bytes[index] += workspace
            self.moments.append(self.now())
            self._bytes[index] -= workspace
            self._may_replace_last = False


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _dense_tensors(tensor: Tensor) -> list[Tensor]:
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return []


def _with_index_numbers(args: Any) -> Any:
    """Replace real masks among the indices by numbers, so that the shape of x[mask] is known.

    Args:
        args: of `aten.index` or `aten.index_put_`: the tensor, its indices, and others.
    """
    tensor, indices, *others = args
    if not isinstance(tensor, FakeTensor):
        return args
    numbers: list[Any] = []
    for index in indices:
        is_real_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        if is_real_mask and not isinstance(index, FakeTensor):
            numbers += index.nonzero().unbind(1)
        else:
            numbers.append(index)
    return (tensor, numbers, *others)


def _default_value(function: Any, tensor: Tensor) -> Any:
    """Return a value for code of Ravine and Lightning that reads one; raise for other code."""
    _, path = _calling_frame()
    if _innermost_path() == LBFGS_FILE or not path.startswith(FOLDERS_WITH_DEFAULTS):
        raise value_error(function)
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 0  # an integer is an error code, or a count


def _innermost_path() -> str:
    """Return the path of the innermost frame outside of this file and of torch's dispatch."""
    frame: Any = sys._getframe(1)
    while (
        frame.f_code.co_filename == __file__
        or "_dynamo" in frame.f_code.co_filename
        or (frame.f_code.co_filename.endswith(("_compile.py", "_python_dispatch.py")))
    ):
        frame = frame.f_back
    return frame.f_code.co_filename


def _calling_frame() -> tuple[Any, str]:
    """Return the innermost frame that is not of torch or this file, and its path."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and not path.startswith((TORCH_FOLDER, "<")):
            return frame, path
        frame = frame.f_back
    return None, ""


def value_error(function: Any) -> UsageError:
    """Return the error for code that needs the values of a tensor, with its file and line."""
    frame, path = _calling_frame()
    location = "torch"
    if _innermost_path() == LBFGS_FILE:
        location = f"the optimizer in {Path(_innermost_path()).name}"
    elif frame is not None:
        location = f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"
    return UsageError(
        f"estimate: {location} needs values of a tensor ({function}), and a simulated step has "
        "shapes only",
        hint="use estimate(..., level='measure'), which runs real steps",
        flag="--measure",
    )
