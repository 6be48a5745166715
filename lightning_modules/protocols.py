"""Optional hooks of a LightningModule and its net that callbacks and strategies look for.

A module that has the members of a protocol supports the feature. It needs no base class: the
callers only test whether the members exist. `docs/adding_a_task.md` lists the hooks.

Axes: b batch, n images, c y x images, t time, d model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

# Hooks of a LightningModule


class CountsUnits(Protocol):
    """Throughput and ProgressBar count units of a batch, such as tokens, instead of its rows."""

    @property
    def unit(self) -> str:
        """Name of the unit, in the plural: "tokens"."""
        ...

    def count_units(self, batch: Any) -> int:
        """Return the number of units in a batch of this rank."""
        ...


class HasProgressMetrics(Protocol):
    """ProgressBar shows these metrics instead of the loss, such as ("train/reward",)."""

    @property
    def progress_metrics(self) -> tuple[str, ...]:
        """Names of logged metrics."""
        ...


class HasPlottedMetrics(Protocol):
    """MetricPlot adds these metrics to its list, such as those of the module's rewards."""

    @property
    def plotted_metrics(self) -> tuple[str, ...]:
        """Names of logged metrics."""
        ...


class CountsFlops(Protocol):
    """Throughput logs the model FLOPs utilization (MFU)."""

    def flops_per_unit(self) -> int:
        """Return the FLOPs of a training step for each unit of `count_units`."""
        ...


class HasParamFormula(Protocol):
    """Summary prints a formula beside the number of parameters."""

    def param_formula(self) -> str:
        """Return the formula, such as "2|V|d + 11Ld²"."""
        ...


class CountsLossTerms(Protocol):
    """TokenWeightedLoss weighs micro-batches by their number of terms, such as tokens."""

    def num_loss_terms(self, batch: Any) -> Tensor | int:
        """Return the number of terms of which the loss of this batch is the mean."""
        ...


class Generates(Protocol):
    """GenerateSamples and the command `generate` sample texts or images."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return text, or images with the methods `grid` and `save`."""
        ...


class TriesGenerate(Protocol):
    """GenerateSamples checks its arguments before training by this short form of `generate`."""

    def try_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Check the arguments of `generate`, and generate one token or one step."""
        ...


class ReturnsLastSamples(Protocol):
    """RolloutTable prints the samples of the last training step."""

    def last_samples(self) -> Sequence[Mapping[str, Any]]:
        """Return samples with a "text", an optional "prompt", and numbers by name."""
        ...


class GeneratesImages(Protocol):
    """FrechetDistance compares sampled images with real ones."""

    def generate_images(self, index: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the uint8 images (n c y x) with these ids (n) and labels (n)."""
        ...


class MakesFigures(Protocol):
    """SaveFigures saves figures of the trained model."""

    def make_figures(self, datamodule: Any) -> Mapping[str, Any]:
        """Return matplotlib figures by name."""
        ...


class HasPredictionColumns(Protocol):
    """PredictionTable names the columns of the tuples that `predict_step` returns."""

    @property
    def prediction_columns(self) -> tuple[str, ...]:
        """Names of the columns, in the order of a tuple."""
        ...


class LoadsPretrained(Protocol):
    """Pretrained loads weights in a format of the module's own."""

    def load_pretrained(self, path: str) -> None:
        """Load the weights at a path into the net, which is built."""
        ...


class Exports(Protocol):
    """The command `export` writes the weights in the format of another library."""

    def export(self, folder: str) -> str:
        """Write files into the folder, and return their names."""
        ...


class ChecksRun(Protocol):
    """RunChecks calls `check` once before the first step; callbacks and datamodules may have it."""

    def check(self, trainer: Any, module: Any, batch: Any) -> None:
        """Raise UsageError if the run cannot work; `batch` may be None."""
        ...


class RestrictsParallelism(Protocol):
    """MeshStrategy refuses the module with these kinds of parallelism."""

    @property
    def unsupported_parallelism(self) -> tuple[str, ...]:
        """Names of arguments of MeshStrategy: "tp", "cp", "pp", "ep"."""
        ...


class HasMembers(Protocol):
    """GradientClipping and OptimizerSweep treat each member of a sweep as a run of its own."""

    def member_parameters(self) -> Sequence[Sequence[nn.Parameter]]:
        """Return the parameters of each member."""
        ...


class EvaluatesPoints(Protocol):
    """ConvergencePlot, StepsToTarget and TrajectoryPlot draw the paths of members of few variables.

    Axes: k points, m members, d variables, p minimizers.
    """

    def member_points(self) -> Tensor:
        """Return the current point of each member (m d)."""
        ...

    def evaluate_points(self, points: Tensor) -> Tensor:
        """Return the objective (k m) at points (k m d)."""
        ...

    def compute_gradients(self, points: Tensor) -> Tensor:
        """Return the gradients (k m d) of the objective at points (k m d)."""
        ...

    def known_minimizers(self) -> Tensor | None:
        """Return the minimizers (m p d); None if they are unknown."""
        ...

    def known_minimum(self) -> Tensor | None:
        """Return the smallest values (m); None if they are unknown."""
        ...


# Hooks of a net, or of a layer


class TensorParallelNet(Protocol):
    """A net whose matrices `tp` splits over ranks."""

    def tensor_parallel_plan(self) -> Mapping[str, str]:
        """Return the style of each module, by glob of module names: {"mlp.up": "colwise"}."""
        ...


class PipelineNet(Protocol):
    """A net whose blocks `pp` places on the stages of a pipeline."""

    blocks: nn.ModuleDict

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Apply the layers before the blocks: (b t) to (b t d)."""
        ...

    def run_blocks(self, x: Tensor, block_names: Sequence[str] | None = None) -> Tensor:
        """Apply the blocks with these names, by default all: (b t d) to (b t d)."""
        ...

    def compute_logits(self, x: Tensor) -> Tensor:
        """Apply the layers after the blocks to (b t d)."""
        ...

    def stage_modules(self) -> tuple[list[str], list[str]]:
        """Return the names of the modules that `embed_tokens` and `compute_logits` need."""
        ...


class HasPositionIds(Protocol):
    """A module that uses positions, which `cp` sets for its part of each sequence."""

    position_ids_override: Tensor | None  # (t); None: 0, 1, 2, ...


class ComputesAttention(Protocol):
    """An attention layer whose function of query, key, value `cp` replaces by ring attention."""

    attention_fn: Any


class HasFullPrecisionLayers(Protocol):
    """A layer with children, by name, whose weights stay in fp32 under mixed precision."""

    @property
    def full_precision(self) -> tuple[str, ...]:
        """Names of the children."""
        ...
