"""Validate the content of a checkpoint: types of the sections, and optimizer states."""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

MAX_SHOWN = 5  # names in a message
SECTION_TYPES: dict[str, type | tuple[type, ...]] = {
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
StateDtypeKinds = list[dict[str, dict[str, str]]]  # by optimizer, parameter and entry
StateShapes = list[dict[str, dict[str, list[int]]]]  # by optimizer, parameter and entry


def find_malformed_section(checkpoint: Any) -> str | None:
    """Describe the first section of a checkpoint with a wrong type; None if all types are right.

    Args:
        checkpoint: the content of a file; anything other than a mapping has no sections.
    """
    if not isinstance(checkpoint, Mapping):
        return None
    for name, expected_type in SECTION_TYPES.items():
        if name in checkpoint and not isinstance(checkpoint[name], expected_type):
            return _type_mismatch_message(f"its {name}", checkpoint[name], expected_type)
    for name in checkpoint.get("state_dict", {}):
        if not isinstance(name, str):
            return f"its state_dict has the name {name!r}, which is not a string"
    for number, state in enumerate(checkpoint.get("optimizer_states", [])):
        label = f"its optimizer_states[{number}]"
        if not isinstance(state, Mapping):
            return _type_mismatch_message(label, state, Mapping)
        for key, expected_type in (("state", Mapping), ("param_groups", list)):
            if key in state and not isinstance(state[key], expected_type):
                return _type_mismatch_message(f"{label}[{key!r}]", state[key], expected_type)
        for group in state.get("param_groups", []):
            if not isinstance(group, Mapping) or not isinstance(group.get("params", []), list):
                return f"{label} has a malformed param group"
        for values in state.get("state", {}).values():
            if not isinstance(values, Mapping | Tensor | int | float | list | None):
                return _type_mismatch_message(f"{label}['state']", values, Mapping)
    for key, state in checkpoint.get("callbacks", {}).items():
        # the lists of paths and scores that ModelCheckpoint keeps
        if not _is_valid_best_files(state):
            return f"its list of best files, of {key}, is malformed"
    return None


EXACT_RESUME_VALIDATORS: dict[str, Callable[[Any], bool]] = {  # by key of ExactResume's record
    "callbacks": lambda v: _is_name_list(v),
    "optimizers": lambda v: _is_name_list(v),
    "data": lambda v: isinstance(v, Mapping),
    "location": lambda v: isinstance(v, str),
    "world": lambda v: isinstance(v, Mapping) and {"ranks", "accumulate"} <= v.keys(),
    "seed": lambda v: type(v) is int and abs(v) < 2**64,
    "metrics": lambda v: isinstance(v, Mapping) and all(map(_is_tensor, v.values())),
    "optimizer_shapes": lambda v: (
        v is None or (isinstance(v, list) and all(map(_is_entry_mapping, v)))
    ),
    "optimizer_kinds": lambda v: (
        v is None or (isinstance(v, list) and all(map(_is_entry_mapping, v)))
    ),
}


def find_malformed_resume_record(record: Any) -> str:
    """Describe a malformed record of ExactResume in a checkpoint; empty if it is valid."""
    if not isinstance(record, Mapping):
        return _type_mismatch_message("its exact_resume", record, Mapping)
    for key, is_valid in EXACT_RESUME_VALIDATORS.items():
        if key in record and not is_valid(record[key]):
            return f"its exact_resume has {reprlib.repr(record[key])[:60]} for {key}"
    return ""


def _is_name_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_entry_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(entries, Mapping) and all(isinstance(v, list | str) for v in entries.values())
        for entries in value.values()
    )


def _is_valid_best_files(state: Any) -> bool:
    """Whether the best files in a callback state are valid, as ModelCheckpoint writes them."""
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


def _type_mismatch_message(name: str, value: Any, expected_type: Any) -> str:
    expected_name = {Mapping: "dict"}.get(
        expected_type, getattr(expected_type, "__name__", "value")
    )
    return f"{name} is a {type(value).__name__} and not a {expected_name}"


def dtype_kind_mismatches(
    module_dtypes: Mapping[str, Any], checkpoint_dtypes: Mapping[str, Any]
) -> str:
    """Describe weights whose kind of dtype differs in a checkpoint; empty if there are none.

    The kinds are real, complex and integer. Another width (bfloat16 for float32) is the same kind.

    Args:
        module_dtypes: dtypes or tensors of the module, by name.
        checkpoint_dtypes: dtypes or tensors of the checkpoint, by name.
    """
    mismatches = []
    for name in sorted(module_dtypes.keys() & checkpoint_dtypes.keys()):
        module_dtype = _dtype_of(module_dtypes[name])
        checkpoint_dtype = _dtype_of(checkpoint_dtypes[name])
        if module_dtype is None or checkpoint_dtype is None:  # not a tensor
            continue
        # _dtype_kind: "real", "complex" or "whole"
        if _dtype_kind(module_dtype) != _dtype_kind(checkpoint_dtype):
            mismatches.append(
                f"{name} is {module_dtype} in the module and {checkpoint_dtype} in the checkpoint"
            )
    return _join_truncated(mismatches)


def _dtype_of(value: Any) -> torch.dtype | None:
    return value if isinstance(value, torch.dtype) else getattr(value, "dtype", None)


def _dtype_kind(dtype: torch.dtype) -> str:
    return "real" if dtype.is_floating_point else "complex" if dtype.is_complex else "whole"


def optimizer_state_shapes(states: Iterable[Any]) -> StateShapes:
    """Return the shapes of all tensors of optimizer states, which a checkpoint records."""
    return [
        {
            str(number): {str(k): list(v.shape) for k, v in values.items() if _is_tensor(v)}
            for number, values in state.get("state", {}).items()
            if isinstance(values, Mapping)
        }
        for state in states
    ]


def optimizer_state_kinds(states: Iterable[Any]) -> StateDtypeKinds:
    """Return the kinds of optimizer state tensors that are not real, which a checkpoint records.

    The kinds are "complex" and "whole" (integer). Scalars are left out, because counters may be
    integer or real.

    Args:
        states: the `optimizer_states` of a checkpoint.

    Returns:
        for each optimizer the kinds by index of the parameter and name of the entry.
    """
    records: StateDtypeKinds = []
    for state in states:
        kinds_by_param = {}
        for number, values in state.get("state", {}).items():
            if not isinstance(values, Mapping):
                continue
            entry_kinds = {
                str(key): _dtype_kind(value.dtype)
                for key, value in values.items()
                if _is_tensor(value) and value.ndim and _dtype_kind(value.dtype) != "real"
            }
            if entry_kinds:
                kinds_by_param[str(number)] = entry_kinds
        records.append(kinds_by_param)
    return records


def find_changed_kinds(states: list[Any], recorded: Any, param_names: list[str]) -> str:
    """Describe optimizer states whose kind differs from `recorded`; empty if there are none.

    Args:
        states: the checkpoint's `optimizer_states`.
        recorded: the result of `optimizer_state_kinds` when the checkpoint was written, or None.
        param_names: names of the module's parameters, by index.
    """
    if recorded is None:
        return ""
    changes = []
    # per optimizer {index of the parameter: {name of the entry: kind}}; not strict, because
    # find_damaged_states reports another number of optimizers
    for before, after in zip(recorded, optimizer_state_kinds(states), strict=False):
        for number in before.keys() | after.keys():
            old, new = before.get(number, {}), after.get(number, {})
            name = _param_name(number, param_names)
            changes += [  # real numbers are not recorded
                f"{key} of {name} has {new.get(key, 'real')} numbers in the optimizer state, and "
                f"was saved with {old.get(key, 'real')} ones"
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            ]
    return _join_truncated(sorted(changes))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def find_damaged_states(
    states: list[Any], recorded: Any, steps: int, param_names: list[str]
) -> str:
    """Describe missing optimizer states, or states with another shape; empty if there are none.

    Args:
        states: the checkpoint's `optimizer_states`.
        recorded: the result of `optimizer_state_shapes` when the checkpoint was written, or None.
        steps: number of optimizer steps before the checkpoint.
        param_names: names of the module's parameters, by index.
    """
    if recorded is None:
        has_lost_all_states = steps > 0 and not states
        return "it has no optimizer state, after a step was taken" if has_lost_all_states else ""
    current_shapes = optimizer_state_shapes(states)
    if len(current_shapes) < len(recorded):
        return (
            f"it has the states of {len(current_shapes)} optimizers, "
            f"and was written with {len(recorded)}"
        )
    problems = []
    # per optimizer {index of the parameter: {name of the entry: shape}}; not strict: optimizers
    # that were not recorded are not compared
    for before, after in zip(recorded, current_shapes, strict=False):
        for number, entries in before.items():
            # _param_name: the name by index, or the text of the index
            name = _param_name(number, param_names)
            if number not in after:
                problems.append(f"the optimizer state of {name} is missing")
                continue
            for key, shape in entries.items():
                stored_shape = after[number].get(key)
                if stored_shape is None:
                    problems.append(f"{key} of {name} is missing in the optimizer state")
                elif stored_shape != shape:
                    problems.append(
                        f"{key} of {name} has shape {stored_shape}, and was written as {shape}"
                    )
    return _join_truncated(problems)


def find_nan_entry(states: Iterable[Any], param_names: list[str]) -> str | None:
    """Return the first non-scalar entry of optimizer states that holds a NaN, or None."""
    for state in states:
        for number, values in state.get("state", {}).items():
            for key, value in values.items() if isinstance(values, Mapping) else ():
                is_float_tensor = _is_tensor(value) and value.is_floating_point() and value.ndim
                if is_float_tensor and value.element_size() > 1 and bool(value.isnan().any()):
                    return f"{key} of {_param_name(number, param_names)} in the optimizer state"
    return None


def _param_name(number: Any, param_names: list[str]) -> str:
    text = str(number)
    return param_names[int(text)] if text.isdecimal() and int(text) < len(param_names) else text


def _join_truncated(messages: list[str]) -> str:
    rest_text = [f"and {len(messages) - MAX_SHOWN} more"] if len(messages) > MAX_SHOWN else []
    return "; ".join(messages[:MAX_SHOWN] + rest_text)
