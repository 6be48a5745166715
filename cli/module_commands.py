"""Commands that a module supports: `test` needs a test_step, `generate` a method generate."""

import inspect
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden

from ravine.errors import UsageError
from ravine.lightning_modules import TaskModule

from .error_report import program_name

STEPS = {"validate": "validation_step", "test": "test_step"}


def possible_commands(module: Any) -> list[str]:
    """Return the commands that can use a checkpoint of the module, the most useful first."""
    commands = [name for name, step in STEPS.items() if is_overridden(step, module)]
    # the forward of TaskModule calls the net, which may need more than a batch of the data
    is_inherited = type(module).forward is TaskModule.forward
    if can_predict(module) and (is_overridden("predict_step", module) or not is_inherited):
        commands.append("predict")
    has_method = [name for name in ("generate", "export") if callable(getattr(module, name, None))]
    return [*has_method, *commands]


def can_predict(module: Any) -> bool:
    """Return whether the module has a predict_step, or a forward that needs only the batch.

    Without predict_step, Lightning calls `forward` with the batch.
    """
    if is_overridden("predict_step", module):
        return True
    if not is_overridden("forward", module):
        return False
    try:
        inspect.signature(module.forward).bind(None)
    except TypeError:
        return False
    return True


def check_command(command: str, module: Any, checkpoint_path: Any) -> None:
    """Raise UsageError for a command that the module has no method for.

    Args:
        command: fit, validate, test or predict.
        module: the model.
        checkpoint_path: the checkpoint of the command, or None.
    """
    possible = possible_commands(module)
    if command in ("fit", *possible) or (command == "predict" and can_predict(module)):
        return
    name = type(module).__name__
    method = STEPS.get(command, "predict_step(batch, batch_idx)")
    # export needs more flags than the checkpoint
    other = next((n for n in possible if n != "export"), None)
    raise UsageError(
        f"{command} is not possible with {name}, which has no method {method}",
        possible,
        hint=f"define {method} in {name}",
        flag=f"{program_name()} {other} --ckpt_path={checkpoint_path or 'last'}" if other else "",
        label="possible",
    )
