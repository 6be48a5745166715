"""Deferred initialization: initial values drawn by (seed, parameter name), equal on every layout.

    values = InitialValues.record(build)     the network on the meta device, with its distributions
    values.sample_rows(name, shape, 0, 100, dtype)     rows 0 to 99 of one parameter
    values.materialize()                               all values, on one process
    parameter.initial_values.get_rows(0, 100)          the same rows by a parameter's attribute

A network's constructor names a distribution for each parameter (`nn.init.normal_`, ..., or
`set_distribution`). On the meta device the constructor runs without memory, and the last operation
on each parameter is recorded. The values are drawn afterwards in chunks of rows, each chunk with
its own generator. So a rank that keeps some rows draws only their chunks; the rows of an orthogonal
matrix depend on each other, so it is drawn whole. Parameters that two modules share stay shared.
Buffers are computed in the constructor as usual: they are small and not random.

This works for networks of this package only: some functions of `nn.init` (`orthogonal_`,
`trunc_normal_`) do nothing on the meta device, so other constructors cannot be recorded reliably.
A network with an unrecorded parameter is built with memory, by the global generator.

Each parameter on the meta device has its `ParameterValues` as attribute `initial_values`, for code
that changes the network before it is sharded. strategies/materialize.py reads the attribute.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

MAX_STDS = 3.0  # of a truncated normal distribution
CHUNK_SIZE = 2**20  # numbers drawn with one generator
MIN_LARGE_TENSOR = 2**18  # numbers of a tensor that is never allocated
aten = torch.ops.aten


class Distribution(NamedTuple):
    """Distribution of a parameter, with two numbers.

    normal              mean, std
    truncated_normal    mean, std; values beyond 3 std of the mean are not drawn
    uniform             low, high
    constant            the value, twice
    orthogonal          gain, and 1 for a stack of matrices (k, rows, columns), else 0. A weight of
                        more than 2 axes is a matrix with the rows of its first axis.
    """

    family: str
    first_param: float = 0.0
    second_param: float = 0.0

    def sample_into(self, rows: Tensor, generator: torch.Generator | None) -> None:
        """Fill `rows` in place with numbers of the distribution.

        Args:
            rows: rows of the parameter (rows, ...); an orthogonal distribution needs all of them.
            generator: generator of the numbers; None: the default one.
        """
        if self.family == "normal":
            rows.normal_(self.first_param, self.second_param, generator=generator)
        elif self.family == "uniform":
            rows.uniform_(self.first_param, self.second_param, generator=generator)
        elif self.family == "truncated_normal":
            # the inverse of the distribution function, in fp32, because bf16 has few values near 1
            limit = math.erf(MAX_STDS / math.sqrt(2))
            numbers = torch.empty(rows.shape, device=rows.device)
            numbers.uniform_(-limit, limit, generator=generator).erfinv_().mul_(math.sqrt(2))
            numbers.clamp_(-MAX_STDS, MAX_STDS)
            rows.copy_(numbers.mul_(self.second_param).add_(self.first_param))
        elif self.family == "orthogonal":
            matrices = rows if self.second_param else rows.flatten(1)  # (rows, rest)
            numbers = torch.empty(matrices.shape, device=rows.device).normal_(generator=generator)
            rows.copy_(self.first_param * orthogonal_factor(numbers).view(rows.shape))
        else:
            rows.fill_(self.first_param)


def orthogonal_factor(matrices: Tensor) -> Tensor:
    """Return the orthogonal factor of matrices (..., rows, columns), uniformly distributed.

    The shorter of rows and columns are orthonormal. The signs make the factor of a normal matrix
    uniform over all orthogonal ones, as in `torch.nn.init.orthogonal_`.
    """
    is_wide = matrices.shape[-2] < matrices.shape[-1]
    q, r = torch.linalg.qr(matrices.mT if is_wide else matrices)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return q.mT if is_wide else q


class _InitRecorder(TorchDispatchMode):
    """Records the last in-place operation on each tensor of the meta device.

    Args:
        large_on_meta: whether large uninitialized tensors (`torch.empty`) are created on the meta
            device. A constructor that computes with such a tensor then fails.
    """

    def __init__(self, large_on_meta: bool) -> None:
        super().__init__()
        self.large_on_meta = large_on_meta
        # by storage and by tensor, as `module.to` changes the storage; None: no simple distribution
        self.distributions: dict[tuple[str, int], Distribution | None] = {}
        self.keep_alive: list[Any] = []  # so that no other tensor or storage gets the same id

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one torch operation, and record it if it fills a meta tensor in place.

        torch calls this method in place of each operation while the mode is active. A tensor on the
        meta device has a shape but no values, so an operation on it costs nothing.
        """
        kwargs = kwargs or {}
        if self.large_on_meta and function is aten.empty.memory_format:
            shape = args[0]
            # of a large `torch.empty`; the meta device cannot pin memory
            device = torch.device(kwargs.get("device") or "cpu")
            if device.type == "cpu" and math.prod(shape) >= MIN_LARGE_TENSOR:
                kwargs = {**kwargs, "device": torch.device("meta"), "pin_memory": None}
        result = function(*args, **kwargs)
        target = args[0] if args else None  # the tensor that an in-place operation changes
        if isinstance(target, Tensor) and target.is_meta and function._schema.is_mutable:
            # an operation on a part of a tensor gives it no simple distribution
            covers_storage = target.numel() * target.itemsize == target.untyped_storage().nbytes()
            distribution = _parse_init_op(function, args[1:], kwargs) if covers_storage else None
            self.record(target, distribution)
        return result

    def record(self, target: Tensor, distribution: Distribution | None) -> None:
        """Set the distribution of a tensor; it replaces that of an earlier operation."""
        # the keys are the ids of the tensor and of its storage
        self.distributions |= dict.fromkeys(_tensor_keys(target), distribution)
        self.keep_alive += [target, target.untyped_storage()]  # so that no id is used again

    def distribution_of(self, parameter: Tensor) -> Distribution | None:
        """Return the recorded distribution of a parameter, or None."""
        return next(
            (
                self.distributions[key]
                for key in _tensor_keys(parameter)
                if key in self.distributions
            ),
            None,
        )


_active_recorders: list[_InitRecorder] = []


@torch.no_grad()
def set_distribution(parameter: Tensor, distribution: Distribution) -> None:
    """Fill a parameter in place with numbers of the default generator.

    On the meta device its distribution is recorded, from which the values are drawn later.
    """
    if not parameter.is_meta:
        distribution.sample_into(parameter, None)
    elif _active_recorders:
        _active_recorders[-1].record(parameter, distribution)


def _tensor_keys(tensor: Tensor) -> tuple[tuple[str, int], ...]:
    return ("storage", tensor.untyped_storage()._cdata), ("tensor", id(tensor))


def _parse_init_op(function: Any, args: Any, kwargs: Any) -> Distribution | None:
    """Return the distribution that an in-place operation gives its tensor, or None if unknown.

    A constructor calls such operations on its parameters; `aten` has torch's basic operations.

    Args:
        function: the torch operation, such as `aten.normal_.default`.
        args: its positional arguments after the tensor.
        kwargs: its keyword arguments; with a generator the values cannot be drawn again.
    """
    values = [float(value) for value in args if isinstance(value, int | float)]
    options = dict(kwargs or {})
    if options.pop("generator", None) is not None or options:
        return None
    # torch omits arguments that equal the defaults, which are (0, 1) for both distributions
    first_param, second_param = (*values, *(0.0, 1.0)[len(values) :])[:2]
    if function is aten.normal_.default:
        return Distribution("normal", first_param, second_param)
    if function is aten.uniform_.default:
        return Distribution("uniform", first_param, second_param)
    if function is aten.zero_.default:
        return Distribution("constant")
    if function is aten.fill_.Scalar:
        return Distribution("constant", values[0], values[0])
    return None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device when a module registers it, in a `with` block."""
    original_register = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original_register(self, name, param)
        if param is not None and not param.is_meta:
            moved = nn.Parameter(param.detach().to("meta"), param.requires_grad)
            self._parameters[name] = moved

    # all modules register their parameters by this method, those of other packages, too
    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original_register  # type: ignore[method-assign]


def _build_recorded(
    build: Callable[[], nn.Module], prefix: str, large_on_meta: bool
) -> tuple[nn.Module | None, dict[str, Distribution]]:
    """Return the network and the distribution of each parameter; None if a parameter has none.

    Args:
        build: creates the network; it runs without memory for parameters.
        prefix: prefix of the parameters' names.
        large_on_meta: whether large uninitialized tensors are created on the meta device.
    """
    # records which random distribution fills each tensor; the values are drawn later
    recorder = _InitRecorder(large_on_meta)
    _active_recorders.append(recorder)
    try:
        with _parameters_on_meta(), recorder:
            net = build()
    except (NotImplementedError, RuntimeError):  # an operation on meta tensors
        return None, {}
    finally:
        _active_recorders.pop()
    distributions = {
        prefix + name: recorder.distribution_of(p) for name, p in net.named_parameters()
    }
    known = {
        name: distribution
        for name, distribution in distributions.items()
        if distribution is not None
    }
    # a buffer on the meta device has lost its values
    has_real_buffers = not any(buffer.is_meta for buffer in net.buffers())
    return (net, known) if has_real_buffers and len(known) == len(distributions) else (None, {})


class ParameterValues:
    """Initial values of one parameter on the meta device: drawn, or read from a stored tensor.

    Args:
        values: initial values of the network.
        name: name of the parameter, including `values.prefix`.
        parameter: the parameter, on the meta device.
    """

    def __init__(self, values: "InitialValues", name: str, parameter: Tensor) -> None:
        """Store the name, shape and dtype; nothing is drawn yet."""
        self.values, self.name = values, name
        self.shape, self.dtype = parameter.shape, parameter.dtype
        self.stored: Tensor | None = None

    def set_source(self, stored: Tensor) -> None:
        """Read the values from a tensor (such as a mapped file) in place of the distribution.

        Args:
            stored: of the parameter's shape, or with fewer rows; the missing rows are zero.
        """
        self.stored = stored.detach()

    def get_rows(self, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` (exclusive), (stop - start, ...), on the CPU, read-only.

        A row is an index of the first axis; a scalar has one row.
        """
        if self.stored is None:
            return self.values.sample_rows(self.name, self.shape, start, stop, self.dtype)
        stored = self.stored if self.shape else self.stored.reshape(1)
        if stop <= len(stored):
            return stored[start:stop].to(self.dtype)
        rows = torch.zeros(stop - start, *self.shape[1:], dtype=self.dtype, device="cpu")
        rows[: max(0, len(stored) - start)] = stored[start:]
        return rows


class InitialValues:
    """A network whose parameters are on the meta device, and the distribution of each parameter.

    Args:
        net: the network.
        distributions: distributions by parameter name.
        seed: seed of all values.
        prefix: prefix of the parameters' names in the LightningModule that holds the network.
    """

    def __init__(
        self, net: nn.Module, distributions: dict[str, Distribution], seed: int, prefix: str
    ) -> None:
        """Set the attribute `initial_values` of each parameter."""
        self.net, self.distributions, self.seed, self.prefix = net, distributions, seed, prefix
        for name, parameter in net.named_parameters():
            parameter_values = ParameterValues(self, prefix + name, parameter)
            parameter.initial_values = parameter_values  # type: ignore[attr-defined]

    @classmethod
    def record(cls, build: Callable[[], nn.Module], prefix: str = "net.") -> "InitialValues | None":
        """Call `build` without memory for parameters.

        Return None if a parameter has no recorded distribution, because the constructor computes
        with values. The seed is one number of the global generator.
        """
        state = torch.get_rng_state()
        for large_on_meta in (True, False):
            net, distributions = _build_recorded(build, prefix, large_on_meta)
            torch.set_rng_state(state)
            if net is not None:
                seed = int(torch.randint(2**62, (), device="cpu"))
                return cls(net, distributions, seed, prefix)
        return None

    def sample_rows(
        self, name: str, shape: torch.Size, start: int, stop: int, dtype: Any
    ) -> Tensor:
        """Draw rows `start` to `stop` (exclusive) of parameter `name`, (stop - start, ...), on CPU.

        A rank of a sharding strategy draws its own rows only, with the values of a single process.

        Args:
            name: name of the parameter, including `prefix`.
            shape: shape of the whole parameter.
            start: first row; a row is an index of the first axis, and a scalar has one row.
            stop: end of the rows.
            dtype: dtype of the rows.
        """
        distribution = self.distributions[name]
        if distribution.family == "orthogonal":  # its rows depend on each other
            matrix = torch.empty(shape, dtype=torch.float32, device="cpu")
            distribution.sample_into(matrix, chunk_generator(self.seed, name, 0))
            return matrix[start:stop].to(dtype)
        row_shape = shape[1:] if shape else torch.Size()
        num_rows = shape[0] if shape else 1
        values = torch.empty(stop - start, *row_shape, dtype=dtype, device="cpu")
        # a chunk has its own generator and is always drawn whole, so that its values are the same
        # for any rows that are asked for
        rows_per_chunk = max(1, CHUNK_SIZE // max(1, row_shape.numel()))
        for chunk in range(start // rows_per_chunk, math.ceil(stop / rows_per_chunk)):
            chunk_start = chunk * rows_per_chunk
            chunk_stop = min(chunk_start + rows_per_chunk, num_rows)
            numbers = torch.empty(chunk_stop - chunk_start, *row_shape, dtype=dtype, device="cpu")
            distribution.sample_into(numbers, chunk_generator(self.seed, name, chunk))
            # copy the rows that lie both in the chunk and in start .. stop
            begin, end = max(start, chunk_start), min(stop, chunk_stop)
            values[begin - start : end - start] = numbers[begin - chunk_start : end - chunk_start]
        return values

    def materialize(self, device: torch.device | str = "cpu") -> nn.Module:
        """Draw the values of every parameter of the network, on one process."""
        new_parameters: dict[int, nn.Parameter] = {}
        for name, parameter in self.net.named_parameters():
            rows = parameter.shape[0] if parameter.ndim else 1
            full = self.sample_rows(self.prefix + name, parameter.shape, 0, rows, parameter.dtype)
            value = torch.empty_like(parameter, device=device, requires_grad=False)  # its strides
            value.copy_(full.view(parameter.shape))
            new_parameters[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
        replace_parameters(self.net, new_parameters)
        return self.net


def chunk_generator(seed: int, name: str, chunk: int) -> torch.Generator:
    """Return the random generator of one chunk of a parameter."""
    digest = hashlib.sha256(f"{seed}/{name}/{chunk}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def replace_parameters(net: nn.Module, new: dict[int, nn.Parameter]) -> None:
    """Replace the parameters with the given ids, also where modules share them."""
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in new:
                module._parameters[name] = new[id(parameter)]
