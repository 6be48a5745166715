"""Ravine, a training framework on PyTorch Lightning: the public names for Python scripts.

    from ravine import Trainer, estimate, load_model

`import ravine` imports only the standard library; each name below is imported at its first use.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ravine.cli.estimation import estimate
    from ravine.cli.loading import load_model
    from ravine.cli.trainer import Trainer
    from ravine.errors import UsageError

    __version__: str

__all__ = ["Trainer", "UsageError", "__version__", "estimate", "load_model"]

_DEFINED_IN = {
    "Trainer": ("ravine.cli.trainer", "Trainer"),
    "estimate": ("ravine.cli.estimation", "estimate"),
    "load_model": ("ravine.cli.loading", "load_model"),
    "UsageError": ("ravine.errors", "UsageError"),
}

# In a checkout the folders of the package are beside this one, not inside it. A program that is
# started in the root of the checkout imports this folder first, and needs the others too.
_HERE = Path(__file__).resolve().parent
if not (_HERE / "callbacks").is_dir():
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ravine")
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'ravine' has no attribute {name!r}; it has {__all__}")
    module, attribute = _DEFINED_IN[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
