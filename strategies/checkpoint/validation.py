"""The form of a checkpoint: the type of each section, and states that a training can resume."""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

SHOWN = 5  # names in a message
SECTIONS: dict[str, type | tuple[type, ...]] = {
    "state_dict": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": Mapping,
    "callbacks": Mapping,
    "hyper_parameters": Mapping,
    "ravine": Mapping,
    "exact_resume": Mapping,
    "transforms": Mapping,
    "epoch": int,
    "global_step": int,
}
Kinds = list[dict[str, dict[str, str]]]  # likewise
Shapes = list[dict[str, dict[str, list[int]]]]  # by optimizer, parameter and entry


def odd(checkpoint: Any) -> str | None:
    """The first section that is of another type than a trainer writes; None if all are right."""
    if not isinstance(checkpoint, Mapping):
        return None
    for name, kind in SECTIONS.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            return _of_type(f"its {name}", checkpoint[name], kind)
    for name in checkpoint.get("state_dict", {}):
        if not isinstance(name, str):
            return f"its state_dict has {name!r} for a name"
    for number, state in enumerate(checkpoint.get("optimizer_states", [])):
        where = f"its optimizer_states[{number}]"
        if not isinstance(state, Mapping):
            return _of_type(where, state, Mapping)
        for key, kind in (("state", Mapping), ("param_groups", list)):
            if key in state and not isinstance(state[key], kind):
                return _of_type(f"{where}[{key!r}]", state[key], kind)
        for group in state.get("param_groups", []):
            if not isinstance(group, Mapping) or not isinstance(group.get("params", []), list):
                return f"{where} has a parameter group that is not one"
        for values in state.get("state", {}).values():
            if not isinstance(values, Mapping | Tensor | int | float | list | None):
                return _of_type(f"{where}['state']", values, Mapping)
    for key, state in checkpoint.get("callbacks", {}).items():
        if not _best_files(state):
            return f"its list of the best files, of {key}, is none"
    return None


RECORD: dict[str, Callable[[Any], bool]] = {  # what ExactResume keeps, by its form
    "callbacks": lambda v: _names(v),
    "optimizers": lambda v: _names(v),
    "data": lambda v: isinstance(v, Mapping),
    "world": lambda v: isinstance(v, Mapping) and {"ranks", "accumulate"} <= v.keys(),
    "seed": lambda v: type(v) is int and abs(v) < 2**64,
    "metrics": lambda v: isinstance(v, Mapping) and all(map(_is_tensor, v.values())),
    "optimizer_shapes": lambda v: v is None or (isinstance(v, list) and all(map(_shapes, v))),
    "optimizer_kinds": lambda v: v is None or (isinstance(v, list) and all(map(_shapes, v))),
}


def odd_record(kept: Any) -> str:
    """What is wrong with a checkpoint's record of its run; empty if nothing is."""
    if not isinstance(kept, Mapping):
        return _of_type("its exact_resume", kept, Mapping)
    for key, fits in RECORD.items():
        if key in kept and not fits(kept[key]):
            return f"its exact_resume has {reprlib.repr(kept[key])[:60]} for {key}"
    return ""


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _shapes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(entries, Mapping) and all(isinstance(v, list | str) for v in entries.values())
        for entries in value.values()
    )


def _best_files(state: Any) -> bool:
    """Whether a state that names the best files, as ModelCheckpoint's does, has its form."""
    if not isinstance(state, Mapping) or "best_k_models" not in state:
        return True
    best, texts = state["best_k_models"], ("best_model_path", "last_model_path")
    texts = (*texts, "kth_best_model_path", "dirpath")
    numbers = (state.get("kth_value"), state.get("best_model_score"))
    return (
        isinstance(best, Mapping)
        and all(isinstance(path, str) for path in best)
        and all(isinstance(value, Tensor | int | float) for value in best.values())
        and all(isinstance(state.get(key, ""), str | None) for key in texts)
        and all(isinstance(value, Tensor | int | float | None) for value in numbers)
        and (not best or state.get("kth_best_model_path") in {*best, "", None})
    )


def _of_type(name: str, value: Any, kind: Any) -> str:
    word = {Mapping: "dict"}.get(kind, getattr(kind, "__name__", "value"))
    return f"{name} is a {type(value).__name__} and not a {word}"


def kind_mismatches(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Weights whose numbers are of another kind in a checkpoint; empty if there are none.

    Real, complex and whole numbers are kinds; another width (bfloat16 for float32) is none.

    Args:
        ours: by name, the dtypes of the module, or its tensors.
        theirs: the same of the checkpoint.
    """
    wrong = []
    for name in sorted(ours.keys() & theirs.keys()):
        here, there = _dtype(ours[name]), _dtype(theirs[name])
        if here is not None and there is not None and _kind(here) != _kind(there):
            wrong.append(f"{name} is {here} here and {there} there")
    return _listed(wrong)


def _dtype(value: Any) -> torch.dtype | None:
    return value if isinstance(value, torch.dtype) else getattr(value, "dtype", None)


def _kind(dtype: torch.dtype) -> str:
    return "real" if dtype.is_floating_point else "complex" if dtype.is_complex else "whole"


def shapes(states: Iterable[Any]) -> Shapes:
    """The shapes of all tensors of optimizer states: what a checkpoint records of them."""
    return [
        {
            str(number): {str(k): list(v.shape) for k, v in values.items() if _is_tensor(v)}
            for number, values in state.get("state", {}).items()
            if isinstance(values, Mapping)
        }
        for state in states
    ]


def kinds(states: Iterable[Any]) -> Kinds:
    """The tensors of optimizer states whose numbers are not real, by kind: a checkpoint's record.

    Single numbers are left out: counters may be whole or real.
    """
    found: Kinds = []
    for state in states:
        of_state = {}
        for number, values in state.get("state", {}).items():
            own = {
                str(key): _kind(value.dtype)
                for key, value in (values.items() if isinstance(values, Mapping) else ())
                if _is_tensor(value) and value.ndim and _kind(value.dtype) != "real"
            }
            of_state |= {str(number): own} if own else {}
        found.append(of_state)
    return found


def changed_kinds(states: list[Any], recorded: Any, names: list[str]) -> str:
    """Entries of optimizer states that are of another kind than `kinds` recorded; or empty."""
    if recorded is None:
        return ""
    wrong = []
    for before, after in zip(recorded, kinds(states), strict=False):
        for number in before.keys() | after.keys():
            old, new = before.get(number, {}), after.get(number, {})
            wrong += [
                f"{key} of {_named(number, names)} has {new.get(key, 'real')} numbers in the "
                f"optimizer state, and was written with {old.get(key, 'real')} ones"
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            ]
    return _listed(sorted(wrong))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def damaged_states(states: list[Any], recorded: Any, steps: int, names: list[str]) -> str:
    """What is missing in the optimizer states of a checkpoint, or of another shape; or empty.

    Args:
        states: the checkpoint's `optimizer_states`.
        recorded: what `shapes` gave when it was written; None if nothing was recorded.
        steps: the optimizer steps that had been taken.
        names: the names of the module's parameters, by place.
    """
    if recorded is None:
        return "it has no optimizer state, after a step was taken" if steps and not states else ""
    found = shapes(states)
    if len(found) < len(recorded):
        return f"it has the states of {len(found)} optimizers, and was written with {len(recorded)}"
    wrong = []
    for before, after in zip(recorded, found, strict=False):
        for number, entries in before.items():
            name = _named(number, names)
            if number not in after:
                wrong.append(f"the optimizer state of {name} is missing")
                continue
            for key, shape in entries.items():
                there = after[number].get(key)
                if there is None:
                    wrong.append(f"{key} of {name} is missing in the optimizer state")
                elif there != shape:
                    wrong.append(f"{key} of {name} has shape {there}, and was written as {shape}")
    return _listed(wrong)


def nan_entry(states: Iterable[Any], names: list[str]) -> str | None:
    """The first entry of optimizer states, as large as a matrix or vector, that holds a NaN."""
    for state in states:
        for number, values in state.get("state", {}).items():
            for key, value in values.items() if isinstance(values, Mapping) else ():
                plain = _is_tensor(value) and value.is_floating_point() and value.ndim
                if plain and value.element_size() > 1 and bool(value.isnan().any()):
                    return f"{key} of {_named(number, names)} in the optimizer state"
    return None


def _named(number: Any, names: list[str]) -> str:
    text = str(number)
    return names[int(text)] if text.isdecimal() and int(text) < len(names) else text


def _listed(wrong: list[str]) -> str:
    more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    return "; ".join(wrong[:SHOWN] + more)
