"""A version of torch whose FSDP2 lacks an attribute is refused in setup, by its name."""

import os
import tomllib
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import pytest
import torch
from external_modules.net_in_init import NetInInit
from torch.distributed.fsdp import FSDPModule

from ravine.strategies.fsdp import torch_attributes
from ravine.strategies.fsdp.torch_attributes import check_fsdp_attributes, fsdp_param_groups


@contextmanager
def without(owner, name):
    """An object whose instance, class and declarations do not have an attribute."""
    with pytest.MonkeyPatch.context() as patch:
        for place in (owner, *type(owner).__mro__):
            if name in vars(place):
                patch.delattr(place, name)
        patch.delitem(getattr(type(owner), "__annotations__", {}), name, raising=False)
        yield


def fit(zero):
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=f"zero{zero}", logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module := NetInInit())
    return module


def refusals():
    """What is said where each attribute is missing, by its name; and of a run."""
    check_fsdp_attributes(module := fit(3))
    unit = next(  # the unit of a parent may have no parameters of its own
        part
        for part in module.modules()
        if isinstance(part, FSDPModule) and fsdp_param_groups(part._get_fsdp_state())
    )
    state = unit._get_fsdp_state()
    group = fsdp_param_groups(state)[0]
    parameter = group.fsdp_params[0]
    owners = [
        (unit, ("_get_fsdp_state",)),
        (state, torch_attributes.FSDP_STATE_ATTRS),
        (state._state_ctx, ("all_states",)),
        (group, torch_attributes.PARAM_GROUP_ATTRS),
        (group.mesh_info, torch_attributes.MESH_INFO_ATTRS),
        (parameter, torch_attributes.PARAM_ATTRS),
        (parameter._module_info, torch_attributes.MODULE_INFO_ATTRS),
    ]
    said = {}
    for owner, names in owners:
        for name in names:
            with without(owner, name), pytest.raises(ValueError, match=name) as error:
                check_fsdp_attributes(module)
            said[f"{type(owner).__name__}.{name}"] = str(error.value)
    check_fsdp_attributes(module)
    NetInInit.training_step = lambda *_: pytest.fail("the run was not refused in setup")
    with without(group, "_to_sharded"), pytest.raises(ValueError, match="_to_sharded") as error:
        fit(2)
    return said, str(error.value)


def test_each_missing_attribute_is_named_with_the_version_of_torch(ranks):
    for said, of_run in ranks(refusals, 2):
        assert len(said) > 20
        said |= {"FSDPParamGroup._to_sharded": of_run}
        for name, text in said.items():
            expected = "FSDPModule._get_fsdp_state" if "_get_fsdp_state" in name else name
            assert text == (
                f"torch {torch.__version__} has no {expected}, which zero2 and zero3 use; allowed:"
                f' torch {torch_attributes.TESTED_TORCH_VERSIONS}; use Trainer(strategy="ddp")'
            )


@pytest.mark.parametrize("owner", torch_attributes.REQUIRED_FUNCTIONS)
def test_a_missing_function_of_torch_is_named(monkeypatch, owner):
    place, name = torch_attributes.REQUIRED_FUNCTIONS[owner]
    monkeypatch.delattr(place, name)
    with pytest.raises(ValueError, match=rf"has no {owner}\.{name}, which zero2"):
        check_fsdp_attributes(NetInInit())


def test_the_versions_that_the_error_allows_are_those_of_the_tests():
    path = Path(__file__).parents[3] / "pyproject.toml"
    versions = tomllib.loads(path.read_text())["tool"]["ravine"]
    ends = [versions[end]["torch"].rpartition(".")[0] for end in ("lowest", "highest")]
    assert " to ".join(ends) == torch_attributes.TESTED_TORCH_VERSIONS
