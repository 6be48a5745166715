"""A checkpoint restores its command; values of the user override it and are compared with it."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from external_modules.net_in_init import NetInInit
from torch import nn

from ravine.callbacks.transforms.base import Transform
from ravine.cli.config.callback_paths import without_output_paths
from ravine.cli.config.trust import TrustPolicy, iter_imported_names
from ravine.cli.loading import load_model as load_trained_model
from ravine.cli.main import main
from ravine.cli.resume_path import find_latest, resolve_argv
from ravine.cli.trainer import Trainer
from ravine.errors import UsageError

BASE = """
model: {class_path: external_modules.net_in_init.NetInInit, init_args: {width: 8}}
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 4
  enable_model_summary: false
"""

TRUST = "--trust=external_modules"  # only the checkpoint names it


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ravine"])
    Path("base.yaml").write_text(BASE)


def saved(version: int = 0, name: str = "base") -> Path:
    """The newest checkpoint of a run."""
    files = Path("runs", name, f"version_{version}", "checkpoints").iterdir()
    return max(files, key=lambda p: p.stat().st_mtime_ns)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one trained run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["ravine"])
        Path("base.yaml").write_text(BASE)
        assert main(["fit", "--config", "base", "--seed_everything=7"]) == 0
    return folder / "runs"


@pytest.fixture
def trained(runs: Path) -> Path:
    """A copy of it in the test's own folder."""
    shutil.copytree(runs, "runs")
    return saved()


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_evaluation_needs_only_a_checkpoint(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("toys.py").write_text(TOYS)
    assert main(["fit", "--config=base", "--model=toys.Toy", "--data=toys.Data"]) == 0
    assert main([command, "--ckpt_path", str(saved()), "--trust=toys"]) == 0
    text = Path(f"runs/base/version_0/{command}_0/config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["model"] == {"class_path": "toys.Toy", "init_args": {"width": 8}}
    assert config["data"] == {"class_path": "toys.Data", "init_args": {"size": 3}}
    assert "is used" not in capsys.readouterr().out


TOYS = """
import lightning as L, torch
from external_modules.net_in_init import NetInInit

class Toy(NetInInit):
    prediction_columns = ("answer",)
    def __init__(self, width: int = 4):
        super().__init__(width)
    def test_step(self, batch, index):
        self.log("test_loss", self.net(batch[0]).mean())
    def predict_step(self, batch, index):
        return [(y.item(),) for y in self.net(batch[0])]

class Data(L.LightningDataModule):
    def __init__(self, size: int = 3):
        super().__init__()
        self.size = size
    def train_dataloader(self):
        return NetInInit(batch_size=self.size).loader()
    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""


def test_run_name_and_seed_are_restored(trained: Path) -> None:
    assert main(["validate", "--ckpt_path", str(trained), TRUST]) == 0
    config = yaml.safe_load(Path("runs/base/version_0/validate_0/config.yaml").read_text())
    assert (config["seed_everything"], config["trainer"]["name"]) == (7, "base")


def test_a_seed_in_the_environment_overrides_that_of_the_checkpoint(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_VALIDATE__SEED_EVERYTHING", "3")
    assert main(["validate", "--ckpt_path", str(trained), TRUST]) == 0
    config = yaml.safe_load(Path("runs/base/version_0/validate_0/config.yaml").read_text())
    assert config["seed_everything"] == 3


def test_a_checkpoint_has_plain_values_and_the_training_arguments(trained: Path) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    own = checkpoint["ravine"]
    assert own["world_size"] == 1
    arguments = {"width": 8, "lr": 0.01, "batch_size": 8}
    assert own["config"]["model"]["init_args"] == arguments
    assert own["config"]["seed_everything"] == 7


def test_a_flag_overrides_the_checkpoint_and_each_difference_is_printed(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["validate", "--ckpt_path", str(trained), "--model.batch_size=4", "--model.lr=0.5"]
    assert main([*words, TRUST]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "is used" in line]
    assert said == [
        "model.batch_size is 4 here and 8 in the checkpoint: 4 is used",
        "model.lr is 0.5 here and 0.01 in the checkpoint: 0.5 is used",
    ]


def test_a_config_overrides_the_checkpoint(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.yaml").write_text(BASE.replace("width: 8", "batch_size: 2"))
    assert main(["validate", "--ckpt_path", str(trained), "--config", "other"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "is used" in line]
    assert said == ["model.batch_size is 2 here and 8 in the checkpoint: 2 is used"]


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_width_that_does_not_fit_is_refused_before_anything_is_loaded(
    command: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, "--config=base", f"--ckpt_path={trained}", "--model.width=4"]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        f"ravine: error: the weights in {trained} do not fit this NetInInit: "
        "net.0.bias is (4,) in the module and (8,) in the checkpoint; "
        "net.0.weight is (4, 4) in the module and (8, 4) in the checkpoint; "
        "net.2.weight is (1, 4) in the module and (1, 8) in the checkpoint\n"
        "  type: the same command without --model.width\n"
    )


def test_weights_of_only_the_model_or_only_the_checkpoint_are_named() -> None:
    module = NetInInit(width=8)
    trainer = Trainer(max_steps=1, accelerator="cpu", enable_model_summary=False)
    trainer.fit(module)
    other = NetInInit(width=8)
    other.head = nn.Linear(1, 1)
    trainer.save_checkpoint("here.ckpt")
    with pytest.raises(
        ValueError, match=r"head.bias is only in the module; head.weight is only in "
    ):
        Trainer(accelerator="cpu").validate(other, ckpt_path="here.ckpt")
    other.strict_loading = False
    Trainer(accelerator="cpu").validate(other, ckpt_path="here.ckpt", verbose=False)


def test_a_checkpoint_of_another_task_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["validate", f"--ckpt_path={trained}", "--model=SpamClassifier", TRUST]
    assert main([*words, "--data=SpamDataModule"]) == 2
    assert capsys.readouterr().err == (
        f"ravine: error: {trained} contains the weights of a NetInInit, which do not fit the model "
        "SpamClassifier of the command\n"
        "  allowed: NetInInit\n"
        f"  type: ravine validate --ckpt_path={trained} {TRUST}\n"
    )


def test_a_new_learning_rate_overrides_the_restored_one(trained: Path) -> None:
    words = ["fit", "--config=base", "--ckpt_path", str(trained), "--trainer.max_epochs=3"]
    assert main([*words, "--model.lr=0.5"]) == 0
    assert main(words) == 0
    rates = [
        torch.load(saved(version), weights_only=True)["optimizer_states"][0]["param_groups"][0]
        for version in (1, 0)  # without a change the run continues in its own folder
    ]
    assert [group["lr"] for group in rates] == [0.5, 0.01]


PLAN = """
trainer:
  callbacks:
  - class_path: OptimizerPlan
    init_args:
      optimizer: {class_path: SGD, init_args: {lr: 0.25}}
      schedule: {kind: linear, final_fraction: 0.5}
"""


def test_a_schedule_continues_from_its_step_at_the_new_rate() -> None:
    Path("plan.yaml").write_text(PLAN)
    words = ["fit", "--config=base", "--config=plan", "--trainer.max_steps=8"]
    assert main([*words, "--trainer.callbacks+=Checkpoint", *EVERY_FOURTH]) == 0
    half = Path("runs/base/version_0/checkpoints/step=000004.ckpt")
    again = PLAN.replace("0.25", "0.75")
    Path("plan.yaml").write_text(again)
    assert main([*words, f"--ckpt_path={half}", "--trainer.max_steps=6"]) == 0
    state = torch.load(saved(1), weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.375)
    assert state["lr_schedulers"][0]["base_lrs"] == [0.75]


EVERY_FOURTH = ["--trainer.callbacks.every_n_train_steps=4", "--trainer.callbacks.save_top_k=-1"]


class Doubled(Transform):
    """A net that answers twice as much: one more weight, to be found again."""

    phase = "adapt"

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def transform(self, module: Any) -> None:
        module.factor = nn.Parameter(torch.tensor(self.factor))

    def config_key(self) -> Any:
        return self.factor


def test_a_transform_is_restored_with_its_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    doubled = f"--trainer.callbacks+={__name__}.Doubled"
    words = [doubled, "--trainer.callbacks.factor=3"]
    assert main(["fit", "--config=base", *words]) == 0
    assert "factor" in weights(saved())
    again = ["validate", "--ckpt_path", str(saved()), TRUST]
    trust_flag = f"--trust={__name__}"
    assert main([*again, trust_flag]) == 0
    assert main([*again, trust_flag, "--trainer.callbacks+=LossPlot"]) == 0
    capsys.readouterr()
    assert main([*again, doubled]) == 0
    assert "trainer.callbacks.Doubled.factor is 2.0 here and 3.0 in" in capsys.readouterr().out


def test_one_callback_needs_no_list_and_may_be_missing_at_evaluation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("gone.py").write_text("import lightning as L\nclass Gone(L.Callback): ...")
    assert main(["fit", "--config=base", "--trainer.callbacks=gone.Gone"]) == 0
    Path("gone.py").unlink()
    del sys.modules["gone"]
    assert main(["validate", "--ckpt_path", str(saved()), TRUST, "--trust=gone"]) == 0


def test_the_resolved_data_source_is_saved_and_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATA_ROOT", "nowhere")
    monkeypatch.setattr(
        "ravine.datamodules.spam.download_if_missing", lambda *args: "no network", raising=False
    )
    tiny = ["--data.source=auto", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config=spam/quick", *tiny]) == 0
    text = Path("runs/spam/quick/version_0/config.yaml").read_text()
    assert yaml.safe_load(text)["data"]["init_args"]["source"] == "embedded"
    assert "# data source: embedded" in text
    words = ["fit", "--config=spam/quick", "--ckpt_path=auto", *tiny]
    assert main([*words, "--trainer.max_epochs=2"]) == 0
    text = Path("runs/spam/quick/version_0/config.yaml").read_text()  # it went on there
    assert yaml.safe_load(text)["trainer"]["max_epochs"] == 2
    assert yaml.safe_load(text)["data"]["init_args"]["source"] == "embedded"


def test_a_saved_config_is_a_config(trained: Path) -> None:
    assert main(["fit", "--config=runs/base/version_0/config.yaml"]) == 0
    again = saved(1)
    assert all(torch.equal(v, weights(again)[k]) for k, v in weights(trained).items())


def test_auto_is_the_newest_complete_file_and_names_the_skipped_files(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config=base", "--trainer.max_epochs=3"]) == 0
    damaged = saved(1)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    capsys.readouterr()
    assert main(["validate", "--config=base", "--ckpt_path=auto"]) == 0
    out = capsys.readouterr().out
    assert f"--ckpt_path auto: {damaged} is skipped: it is cut short" in out
    assert main(["validate", "--config=base", "--ckpt_path=last"]) == 2
    err = capsys.readouterr().err
    assert f"the last checkpoint, {damaged}, cannot be used: it is cut short" in err
    assert "type: --ckpt_path=auto" in err


def test_auto_skips_a_file_that_no_trainer_has_written(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["ravine"]["config"] = [1]
    for name, content in (("weights", {"w": torch.ones(1)}), ("odd", checkpoint)):
        torch.save(content, trained.with_name(f"{name}.ckpt"))
        assert main(["validate", "--config=base", "--ckpt_path=auto"]) == 0
        out = capsys.readouterr().out
        assert f"{name}.ckpt is skipped" in out
        assert f"--ckpt_path auto: {trained}\n" in out


def test_auto_starts_from_scratch_without_a_checkpoint_and_resumes_with_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["fit", "--config=base", "--ckpt_path=auto"]
    assert main(words) == 0
    assert "no checkpoint in runs/base yet, starting from scratch" in capsys.readouterr().out
    assert main([*words, "--trainer.max_epochs=4"]) == 0
    assert torch.load(saved(), weights_only=True)["global_step"] == 16  # in the same folder
    assert main(["validate", "--trainer.name=other", "--ckpt_path=auto"]) == 2
    assert "names with checkpoints: base" in capsys.readouterr().err


def test_the_arguments_for_other_ranks_contain_the_resolved_path(trained: Path) -> None:
    for given in (["--ckpt_path=auto"], ["--ckpt_path", "last"]):
        argv, path = resolve_argv(["fit", "--config=base.yaml", *given])
        assert path == trained
        assert (argv[1], argv[-1]) == ("--trainer.name=base", f"--ckpt_path={trained}")
    Path("asks.yaml").write_text("ckpt_path: auto\ntrainer: {name: nothing}")
    argv, path = resolve_argv(["fit", "--config=base.yaml", "--config=asks.yaml"])
    assert (argv[-1], path) == ("--ckpt_path=null", None)
    os.environ["PL_FIT__CKPT_PATH"] = "x.ckpt"
    assert resolve_argv(["fit"])[1] == Path("x.ckpt")


def test_without_a_name_the_newest_checkpoint_of_all_runs_is_used(trained: Path) -> None:
    assert main(["fit", "--config=base", "--trainer.name=a/b"]) == 0
    assert find_latest("test", "last", None, "runs") == saved(0, "a/b")
    assert find_latest("test", "last", "base", "runs") == trained


def test_a_checkpoint_from_a_script_needs_its_model_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = Trainer(max_steps=1, accelerator="cpu", enable_model_summary=False)
    trainer.fit(NetInInit())
    trainer.save_checkpoint("script.ckpt")
    assert main(["validate", "--ckpt_path=script.ckpt"]) == 2
    assert capsys.readouterr().err == (
        "ravine: error: script.ckpt was not written by a command, so it does not name its model\n"
        "  type: ravine validate --ckpt_path=script.ckpt --model=NAME --data=NAME\n"
    )
    named = "--model=external_modules.net_in_init.NetInInit"
    assert main(["validate", "--ckpt_path=script.ckpt", named]) == 0


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2]])
def test_a_file_of_torch_save_that_is_not_a_checkpoint_is_refused(
    content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, "other.ckpt")
    words = ["--ckpt_path=other.ckpt", "--model=external_modules.net_in_init.NetInInit"]
    assert main(["validate", *words]) == 2
    assert "other.ckpt is a file of torch.save, but not a checkpoint" in capsys.readouterr().err


def shape_error(trained: Path) -> str:
    trainer = Trainer(devices=2, strategy="zero3", accelerator="cpu", logger=False)
    module = NetInInit(width=4, batch_size=4)
    with pytest.raises(UsageError) as error:
        trainer.validate(module, ckpt_path=str(trained), verbose=False)
    return str(error.value)


def test_the_full_shapes_of_a_sharded_net_are_compared_with_the_checkpoint(
    trained: Path, ranks: Callable[..., list[Any]]
) -> None:
    first, second = ranks(shape_error, 2, trained)
    assert first == second
    assert "net.0.bias is (4,) in the module and (8,) in the checkpoint" in first


ACTS = """
from pathlib import Path
Path("mark").touch()
import lightning as L
class Thing(L.Callback): ...
class Model(L.LightningModule): ...
def reward(texts): return [0.0 for _ in texts]
"""
NAMED = [
    ("model.class_path", "acts.Model"),
    ("data.class_path", "acts.Thing"),
    ("data.class_path", "ravine.cli.command.sys.exit"),
    ("trainer.callbacks.0.class_path", "acts.Thing"),
    ("model.init_args.optimizer", {"class_path": "acts.Thing"}),
    ("model.init_args.rewards", [{"class_path": "ravine.lightning_modules.RewardFunction",
                                  "init_args": {"function": "acts.reward"}}]),
    ("model.class_path", "os.system"),
    ("model.class_path", "torch.hub.load"),
]  # fmt: skip


def plan(**arguments: Any) -> dict[str, Any]:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    init = {"optimizer": optimizer, **arguments}
    return {"class_path": "ravine.callbacks.OptimizerPlan", "init_args": init}


def callback(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


SPEC = '{"class_path": "acts.Thing"}'
IN_TEXTS = [  # what the parser reads as YAML, or as the name of a file, or imports in part
    plan(optimizer=SPEC),
    plan(optimizer=f"[{SPEC}]"),
    plan(optimizer="class_path: acts.Thing"),
    plan(optimizer="spec.yaml"),
    plan(optimizer="spec"),
    plan(optimizer="acts.Thing # text"),
    plan(optimizer="acts.1"),
    plan(optimizer="acts..Thing"),
    plan(rules=f"[{{optimizer: {SPEC}}}]"),
    plan(rules=[f"{{optimizer: {SPEC}}}"]),
    plan(rules=[{"optimizer": SPEC}]),
    plan(**{"optimizer.class_path": "acts.Thing"}),
    {**plan(), "init_args.optimizer": "acts.Thing"},
    plan(schedule={**callback("ravine.callbacks.LRSchedule"), "init_args.kind": "acts.Thing"}),
    callback("ravine.callbacks.FrechetDistance", extractor=SPEC),
    callback("ravine.callbacks.FrechetDistance", extractor="spec.yaml"),
    callback("ravine.callbacks.GenerateSamples", arguments={"prompt": SPEC}),
    callback("ravine.callbacks.GenerateSamples", arguments=f"{{prompt: [{SPEC}]}}"),
    callback("lightning.pytorch.callbacks.LambdaCallback", on_fit_start=SPEC),
    callback("lightning.pytorch.callbacks.LambdaCallback", on_fit_start=" acts.reward"),
]


def test_a_text_in_a_checkpoint_has_the_import_limits_of_a_class_path(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("acts.py").write_text(ACTS)
    for name in ("spec.yaml", "spec"):
        Path(name).write_text("class_path: acts.Thing\n")
    for spec in IN_TEXTS:
        with pytest.raises(ValueError, match=r"it is not imported, because"):
            TrustPolicy().check_callback(spec, "FILE")
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["ravine"]["config"]["trainer.callbacks"] = [IN_TEXTS[0]]
    torch.save(checkpoint, "evil.ckpt")
    assert main(["fit", "--ckpt_path=evil.ckpt", TRUST]) == 2
    assert "--trust=acts" in capsys.readouterr().err
    assert not Path("mark").exists()
    assert "acts" not in sys.modules


def test_a_file_name_in_the_command_does_not_admit_a_class(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("acts", "notes"):
        Path(f"{name}.py").write_text(ACTS)
    Path("notes.txt").write_text("text " * 99)
    checkpoint = torch.load(trained, weights_only=True)
    for path in ("acts.ckpt", "notes.txt"):
        checkpoint["ravine"]["config"]["model"]["class_path"] = path
        torch.save(checkpoint, "acts.ckpt")
        words = ["--data=TextDataModule", "--data.path=notes.txt", "--ckpt_path=acts.ckpt"]
        assert main(["fit", *words, TRUST]) == 2
        assert f"names {path!r}, which is not a class of Ravine" in capsys.readouterr().err
    assert not Path("mark").exists()


def test_an_unreadable_type_hint_does_not_affect_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("hinted.py").write_text(
        "from __future__ import annotations\n"
        "class Hinted:\n"
        "    def __init__(self, path: str, net: Missing, size: int | None = None): ...\n"
    )
    given = {"path": "big-1.csv", "size": "1.5", "net": "os.system"}
    spec = {"class_path": "hinted.Hinted", "init_args": given}
    assert list(iter_imported_names(spec, TrustPolicy(["hinted"]))) == [
        "hinted.Hinted",
        "os.system",
    ]


def test_texts_that_name_no_class_are_not_imported() -> None:
    rule = {"kind": "rest", "pattern": "net.head.weight", "lr_scale": 2.0}
    specs = [
        plan(rules=[rule, {"pattern": "*.gate.*"}]),
        callback(
            "ravine.callbacks.GenerateSamples", arguments={"prompt": "Well. No.", "stop": "a.b"}
        ),
    ]
    found = {path for spec in specs for path in iter_imported_names(spec, TrustPolicy())}
    assert found == {*(spec["class_path"] for spec in specs), "torch.optim.AdamW"}


@pytest.mark.parametrize(("key", "value"), NAMED)
def test_a_class_that_only_the_checkpoint_names_is_not_imported(
    trained: Path, key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("acts.py").write_text(ACTS)
    config = {
        "model": {"class_path": "ravine.lightning_modules.Reinforce", "init_args": {}},
        "data": {"class_path": "ravine.datamodules.TextDataModule"},
        "trainer.callbacks": [{"class_path": "ravine.callbacks.EMA"}],
    }
    place: Any = config
    first, _, rest = key.removeprefix("trainer.").partition(".")
    steps = [f"trainer.{first}" if key.startswith("trainer.") else first, *rest.split(".")]
    for step in steps[:-1]:
        place = place[int(step) if step.isdigit() else step]
    place[steps[-1]] = value
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["ravine"]["config"] |= config
    torch.save(checkpoint, "evil.ckpt")
    for command in ("fit", "validate", "generate"):
        if command == "generate" and key != "model.class_path":
            continue
        assert main([command, "--ckpt_path=evil.ckpt"]) == 2
        err = capsys.readouterr().err
        assert "--trust=" in err
        assert len(err.splitlines()) == 3
    assert not Path("mark").exists()
    assert "acts" not in sys.modules


def test_a_script_trusts_a_package_by_name(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"; pass trust=\['external_modules'\]"):
        load_trained_model(trained)
    with pytest.raises(ValueError, match=r"the weights of external_modules.net_in_init.NetInInit"):
        load_trained_model(trained, trust=["external_modules"])  # imported, and no TaskModule


@pytest.mark.parametrize(
    "config",
    ["text", [1], {"model": None}, {"model": {"class_path": 3}}, {"trainer.callbacks": "a.b"}],
)
def test_a_configuration_that_no_command_has_written_is_refused(
    trained: Path, config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    whole = checkpoint["ravine"]["config"]
    checkpoint["ravine"]["config"] = whole | config if isinstance(config, dict) else config
    torch.save(checkpoint, "odd.ckpt")
    assert main(["validate", "--ckpt_path=odd.ckpt"]) == 2
    assert "ravine.config, was not written by a command" in capsys.readouterr().err


def test_broken_and_circular_links_are_skipped(trained: Path) -> None:
    for name, target in (("dangling.ckpt", "gone.ckpt"), ("loop.ckpt", "loop.ckpt")):
        (trained.parent / name).symlink_to(target)
    for questions in ("auto", "last"):
        assert find_latest("fit", questions, "base", "runs") == trained
    assert main(["validate", "--config=base", f"--ckpt_path={trained.parent}/loop.ckpt"]) == 2


def test_a_metric_with_a_slash_in_a_file_s_name_makes_a_folder_that_is_found() -> None:
    stock = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
    named = "--trainer.callbacks.filename={step}-{train/loss:.2f}"
    assert main(["fit", "--config=base", stock, named, "--trainer.max_epochs=1"]) == 0
    (path,) = Path("runs").rglob("*.ckpt")
    assert path.parent.name.endswith("-train")
    assert find_latest("test", "last", None, "runs") == path
    assert find_latest("fit", "auto", "base", "runs") == path


def test_checkpoints_in_a_user_folder_are_found_by_the_run_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = ["--trainer.callbacks+=Checkpoint", "--trainer.callbacks.dirpath=mine"]
    for name, steps in (("one", 2), ("two", 4)):
        words = ["fit", "--config=base", *own, f"--trainer.name={name}"]
        assert main([*words, f"--trainer.max_steps={steps}"]) == 0
    said = capsys.readouterr().out
    assert "no step was trained" not in said
    assert said.count("done: runs/") == 2
    one, two = sorted(Path("mine").resolve().iterdir())
    assert find_latest("test", "last", "one", "runs") == one
    assert find_latest("test", "last", "two", "runs") == two
    assert find_latest("test", "last", None, "runs") == two
    words = ["fit", "--config=base", *own, "--trainer.name=two", "--ckpt_path=auto"]
    assert main([*words, "--trainer.max_steps=4"]) == 0
    assert "no step was trained" in capsys.readouterr().out
    assert two.exists()


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", "a/../../../b"])
def test_a_run_name_does_not_lead_outside_of_default_root_dir(
    trained: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["ravine"]["config"]["trainer.name"] = name
    torch.save(checkpoint, "odd.ckpt")
    for words in (["--ckpt_path=odd.ckpt", TRUST], [f"--trainer.name={name}", "--config=base"]):
        assert main(["validate", *words]) == 2
        assert "leads to a folder outside of default_root_dir" in capsys.readouterr().err


@pytest.mark.parametrize("argument", [{"dirpath": "elsewhere"}, {"filename": "{HERE/out}"}])
def test_a_resume_writes_only_in_its_own_folder(trained: Path, argument: dict[str, str]) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    placed = {key: value.replace("HERE", str(Path.cwd())) for key, value in argument.items()}
    stock = callback("lightning.pytorch.callbacks.ModelCheckpoint", **placed)
    checkpoint["ravine"]["config"]["trainer.callbacks"] = [stock]
    checkpoint["callbacks"].clear()
    torch.save(checkpoint, "odd.ckpt")
    before = set(Path.cwd().iterdir())
    cpu = ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false", TRUST]
    assert main(["fit", "--ckpt_path=odd.ckpt", *cpu, "--trainer.max_epochs=2"]) == 0
    assert set(Path.cwd().iterdir()) == before
    assert list(Path("runs/base/version_1").rglob("*.ckpt"))


def test_a_file_name_template_of_a_checkpoint_cannot_leave_the_folder() -> None:
    kept = ["{epoch}-{val/loss:.2f}", "step={step:06d}", "best", "{val.loss:8.3e}"]
    for name in [*kept, "../x", "/x", "{/x}", "{../x}", "{step:c}x", "{epoch].__doc__[9}", "{{x"]:
        spec = callback("lightning.pytorch.callbacks.ModelCheckpoint", filename=name)
        assert ("filename" in without_output_paths(spec)["init_args"]) == (name in kept)
    spec = {
        "class_path": "ravine.callbacks.FrechetDistance",
        "init_args": {"cache_dir": "x", "num_samples": 9},
    }
    assert without_output_paths(spec)["init_args"] == {"num_samples": 9}


def test_a_run_name_of_a_checkpoint_does_not_lead_outside_by_a_link(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["ravine"]["config"]["trainer.name"] = "linked"
    torch.save(checkpoint, "odd.ckpt")
    Path("outside").mkdir()
    Path("runs/linked").symlink_to(Path("outside").resolve())
    assert main(["validate", "--ckpt_path=odd.ckpt", TRUST]) == 2
    assert "leads outside of runs by a symbolic link" in capsys.readouterr().err
    assert not list(Path("outside").iterdir())
    assert main(["validate", "--ckpt_path=odd.ckpt", TRUST, "--trainer.name=linked"]) == 0


def test_a_checkpoint_alone_restores_the_configuration_of_its_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("plan.yaml").write_text(PLAN)
    words = ["--trainer.callbacks+=GradientClipping", "--trainer.accumulate_grad_batches=2"]
    words += ["--trainer.val_check_interval=3", "--trainer.check_val_every_n_epoch=null"]
    assert main(["fit", "--config=base", "--config=plan", *words, "--trainer.max_epochs=2"]) == 0
    cpu = ["--trainer.accelerator=cpu", "--trainer.max_epochs=3", TRUST]
    alone = ["fit", f"--ckpt_path={saved()}", *cpu]
    capsys.readouterr()
    assert main([*alone, "--trainer.enable_model_summary=false"]) == 0
    said = "callbacks of the checkpoint: OptimizerPlan, GradientClipping"
    out = capsys.readouterr().out
    assert said in out
    assert out.count("is used") == 1  # only the length differs
    assert "trainer.max_epochs is 3 here and 2 in the checkpoint: 3 is used" in out
    config = yaml.safe_load(Path("runs/base/version_0/config.yaml").read_text())  # it went on
    assert config["trainer"]["max_epochs"] == 3
    assert config["trainer"]["accumulate_grad_batches"] == 2
    assert config["trainer"]["check_val_every_n_epoch"] is None
    assert main([*alone, "--trainer.callbacks=GradientClipping"]) == 2
    err = capsys.readouterr().err
    assert "the optimizers of the checkpoint (SGD of 4 tensors)" in err
    assert "type: the same command without --trainer.callbacks= and --config" in err
