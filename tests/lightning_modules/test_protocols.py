"""The protocols of optional hooks: callers look for each member, and some class has it."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from ravine.callbacks import SaveFigures
from ravine.lightning_modules import (
    Diffusion,
    ImageClassifier,
    LanguageModel,
    Objective,
    Regression,
    Reinforce,
    protocols,
)

ROOT = Path(__file__).resolve().parents[2]
PROTOCOLS: dict[str, Any] = {
    name: kind
    for name, kind in vars(protocols).items()
    if inspect.isclass(kind) and kind.__module__ == protocols.__name__
}


def members(kind: Any) -> list[str]:
    return [name for name in (*kind.__annotations__, *vars(kind)) if not name.startswith("_")]


def implementations() -> list[Any]:
    """Tasks, a network and its layers, and a callback."""
    model = LanguageModel(5, 8, num_layers=1, d_model=8, num_heads=2, num_experts=2)
    model.configure_model()
    assert model.net is not None
    tasks = [Diffusion(base_channels=8), ImageClassifier(), Objective(), Regression(), Reinforce]
    return [*model.modules(), *tasks, SaveFigures]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_hook_is_looked_for_by_a_callback_a_strategy_or_a_command(name: str) -> None:
    folders = [ROOT / folder for folder in ("callbacks", "strategies", "cli")]
    text = "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    assert [member for member in members(PROTOCOLS[name]) if member not in text] == []


@pytest.mark.parametrize("name", PROTOCOLS)
def test_some_class_has_all_members_and_takes_their_arguments(name: str) -> None:
    kind = PROTOCOLS[name]
    found = [x for x in implementations() if all(hasattr(x, member) for member in members(kind))]
    assert found
    for member in members(kind):
        hook = vars(kind).get(member)
        if inspect.isfunction(hook):
            positional = [
                p
                for p in inspect.signature(hook).parameters.values()
                if p.kind is p.POSITIONAL_OR_KEYWORD
            ]
            arguments = positional if inspect.isclass(found[0]) else positional[1:]
            inspect.signature(getattr(found[0], member)).bind(*arguments)
