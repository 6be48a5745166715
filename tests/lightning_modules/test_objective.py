"""Objective: closed forms of gradient descent, stop rules, and functions that are refused."""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from member_runs import plan, run, sweep
from torch.optim import SGD, Adam

from ravine.callbacks import EMA, GradientClipping, LRSchedule, OptimizerPlan, TrajectoryPlot
from ravine.cli.main import main
from ravine.cli.trainer import Trainer
from ravine.errors import UsageError
from ravine.lightning_modules import Objective
from ravine.lightning_modules.objectives.functions import quadratic_eigenvalues


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_each_eigendirection_of_a_quadratic_contracts_by_its_own_factor():
    """(1 - lr eigenvalue)^k to 1e-12, for a condition number of 100 in three dimensions."""
    module = Objective("quadratic", start=[1.0, -2.0, 3.0], condition_number=100)
    paths = run(module, 60, OptimizerPlan(partial(SGD, lr=0.015)))
    eigenvalues = quadratic_eigenvalues(3, 100)
    assert eigenvalues.tolist() == pytest.approx([1, 10, 100])
    k = torch.arange(61, dtype=torch.float64)[:, None]
    expected = (1 - 0.015 * eigenvalues) ** k * torch.tensor([1.0, -2.0, 3.0])
    assert (paths.stacked_points()[:, 0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("function", "minimizers"),
    [
        ("quadratic", [[0, 0]]),
        ("double_well", [[1, 1], [1, -1], [-1, 1], [-1, -1]]),
        ("ravine", [[0, 0]]),
        ("coupled_ravine", [[0, 0]]),
        ("rosenbrock", [[1, 1]]),
        ("beale", [[3, 0.5]]),
    ],
)
def test_the_gradient_vanishes_at_the_known_minimizers(function: Any, minimizers: Any) -> None:
    module = Objective(function, start=[0.5, 0.7])
    known = module.known_minimizers()
    assert known is not None
    assert known[0].tolist() == minimizers
    points = known[0][:, None]  # (k 1 d)
    assert module.compute_gradients(points).abs().max() < 1e-12
    assert module.evaluate_points(points).tolist() == [[0.0]] * len(minimizers)
    around = points + 0.1 * torch.randn(len(points), 1, 2, dtype=torch.float64)
    assert (module.evaluate_points(around) > 0).all()


def test_a_saddle_has_no_minimizer():
    module = Objective("saddle", start=[1.0, 1.0])
    assert module.known_minimizers() is None
    assert module.known_minimum() is None


def test_members_of_a_sweep_equal_single_runs_bit_for_bit():
    rates = (0.001, 0.01, 0.03)
    module = Objective("rosenbrock", start=[-1.2, 1.0], num_members=3)
    together = run(module, 40, sweep(*rates, momentum=0.5)).stacked_points()
    for member, lr in enumerate(rates):
        single = Objective("rosenbrock", start=[-1.2, 1.0])
        alone = run(single, 40, OptimizerPlan(partial(SGD, lr=lr, momentum=0.5)))
        assert torch.equal(
            alone.stacked_points()[:, 0].nan_to_num(), together[:, member].nan_to_num()
        )


@pytest.mark.parametrize("steps_per_batch", [4, 7])
def test_several_steps_in_a_batch_equal_one_step_in_each(steps_per_batch: int) -> None:
    schedule = LRSchedule("cosine", warmup=5)

    def train(per_batch: int) -> Any:
        module = Objective("ravine", start=[3.0, 2.0], steps_per_batch=per_batch)
        descent = OptimizerPlan(partial(SGD, lr=0.02), schedule=schedule)
        return run(module, 28, descent, GradientClipping(1.0))

    one, several = train(1), train(steps_per_batch)
    assert several.steps == one.steps == list(range(29))
    assert torch.equal(one.stacked_points(), several.stacked_points())
    assert one.lrs[:28] == several.lrs[:28]


def test_a_stopped_member_stays_and_the_run_ends_when_all_have_stopped():
    module = Objective("quadratic", start=[5.0], num_members=3, objective_target=1e-5)
    paths = run(module, 500, sweep(0.5, 0.1, 0.25))
    assert module.stop_steps == [11, 67, 25]
    assert paths.steps[-1] == 67
    assert paths.stacked_points()[11:, 0].unique().numel() == 1


def test_a_diverging_member_stops_and_others_go_on():
    module = Objective("double_well", start=[2.0], num_members=2, max_objective=1e20)
    paths = run(module, 30, sweep(0.5, 0.01))
    assert module.stop_steps[0] is not None
    assert module.stop_steps[1] is None
    assert paths.steps[-1] == 30


def test_the_gradient_rule_is_checked_before_the_update():
    module = Objective("quadratic", start=[1.0], gradient_tolerance=1.0)
    paths = run(module, 10, OptimizerPlan(partial(SGD, lr=0.5)))
    assert module.stop_steps == [0]
    assert paths.stacked_points().tolist() == [[[1.0]]]


def test_clipping_acts_on_each_member_by_its_own_norm():
    """With one norm for all, the member with the steep start would stop the other one."""
    module = Objective("quadratic", start=[4.0, 0.0], num_members=2)
    run(module, 1, sweep(0.1, 0.001), GradientClipping(max_norm=1.0))
    points = module.member_points()
    assert points[:, 0].tolist() == pytest.approx([3.9, 3.999], abs=1e-6)


def test_ema_averages_the_path_and_refuses_several_steps_in_a_batch():
    module = Objective("quadratic", start=[1.0])
    run(module, 2, OptimizerPlan(partial(SGD, lr=0.5)), EMA(decay=0.5, warmup=False))
    assert module.member_points().item() == pytest.approx(0.5 * (0.5 * 1 + 0.5 * 0.5) + 0.5 * 0.25)
    module = Objective("quadratic", start=[1.0], steps_per_batch=2)
    with pytest.raises(
        UsageError, match=r"EMA averages the weights once a batch.*steps_per_batch=1"
    ):
        run(module, 2, OptimizerPlan(partial(SGD, lr=0.5)), EMA())


def test_a_function_of_a_file_trains_by_its_dotted_path(folder: Path) -> None:
    (folder / "my_file.py").write_text("def f(w):\n    return ((w - 3) ** 2).sum()\n")
    module = Objective("my_file.f", start=[0.0], minimizer=[3.0])
    assert module.hparams["function"] == "my_file.f"
    paths = run(module, 50, OptimizerPlan(partial(SGD, lr=0.25)))
    assert paths.compute_metric(module, "distance")[-1].item() < 1e-12
    words = ["fit", "--model=Objective", "--model.function=my_file.f", "--model.start=[0]"]
    assert main([*words, "--trainer.max_steps=2", "--trainer.accelerator=cpu"]) == 0


def test_a_function_that_vmap_cannot_apply_is_applied_to_each_member():
    def branch(w: torch.Tensor) -> torch.Tensor:
        return w.sum() ** 2 if float(w.detach().sum()) > 0 else w.sum() ** 4

    module = Objective(branch, start=[1.0], num_members=2)
    assert not module.is_vmappable
    run(module, 1, sweep(0.1, 0.6))
    assert module.member_points().flatten().tolist() == pytest.approx([0.8, -0.2])


def test_a_checkpoint_restores_function_and_point(folder: Path) -> None:
    import ravine

    module = Objective("beale", start=[1.0, 1.0])
    trainer = ravine.Trainer(accelerator="cpu", max_steps=5, logger=False)
    trainer.fit(module)
    trainer.save_checkpoint("end.ckpt")
    loaded = Objective.load_from_checkpoint("end.ckpt")
    assert loaded.hparams["function"] == "beale"
    assert torch.equal(loaded.member_points(), module.member_points())


class Rounds(torch.nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return torch.tensor(float(w.detach().sum()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": Rounds()}, "is not differentiable: its value has no gradient"),
        ({"function": lambda w: w**2, "start": [1.0, 2.0]}, "returns (2,) instead of a scalar"),
        (
            {"function": lambda w: float(w.detach().sum())},
            "returns float instead of a scalar tensor",
        ),
        ({"function": lambda w: w.numpy().sum()}, "fails at start=[5.0]: RuntimeError: Can't call"),
        ({"function": lambda w: w.log().sum(), "start": [-1.0]}, "is nan at start=[-1.0]"),
        ({"start": [float("nan")]}, "start=[nan] is not a point; allowed: one finite number"),
        ({"start": []}, "start=[] is not a point"),
        ({"function": "ravin", "start": [1.0, 1.0]}, "use function='ravine'"),
        ({"function": "ravine"}, "ravine is a function of 2 variables, and start has 1"),
        ({"function": "ravine", "start": [1.0, 1.0], "center": 1.0}, "belong to the quadratic"),
        ({"condition_number": 0.5, "start": [1.0, 1.0]}, "condition_number=0.5 is not the ratio"),
        ({"condition_number": 5.0}, "a quadratic of one variable has one eigenvalue"),
        ({"function": "no_file.f"}, "the objective function no_file.f does not exist: there is no"),
        ({"minimizer": [0.0]}, "the minimizers of quadratic are known"),
        ({"num_members": 0}, "num_members=0 is too small"),
        ({"dtype": "float16"}, "dtype='float16' is not supported; allowed: float32, float64"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        Objective(**arguments)
    assert "\n" not in str(error.value)


def test_a_contour_of_three_variables_and_a_missing_minimizer_are_refused():
    module = Objective("quadratic", start=[1.0, 1.0, 1.0])
    with pytest.raises(UsageError, match="draws functions of 2 variables, and Objective has 3"):
        run(module, 2, TrajectoryPlot())
    module = Objective("saddle", start=[1.0, 1.0])
    paths = run(module, 2)
    with pytest.raises(UsageError, match=r"the gap needs the minimizer.*objective"):
        paths.compute_metric(module, "gap")


def test_a_sweep_of_other_length_than_the_members_is_refused():
    module = Objective("quadratic", start=[1.0], num_members=2)
    with pytest.raises(UsageError, match=r"members\.2"):
        run(module, 2, sweep(0.1, 0.2, 0.3))
    module = Objective("quadratic", start=[1.0], num_members=2)
    with pytest.raises(UsageError, match=r"no rule matches net.members.1"):
        run(module, 2, sweep(0.1))


def test_each_member_can_have_its_own_optimizer_and_schedule():
    module = Objective("quadratic", start=[1.0], num_members=3)
    schedules = [None, LRSchedule("power", power=1.0), LRSchedule("exponential", decay_factor=0.5)]
    paths = run(
        module,
        3,
        plan(
            partial(SGD, lr=0.5), partial(SGD, lr=0.5), partial(Adam, lr=0.1), schedules=schedules
        ),
    )
    assert paths.lrs[:3] == [[0.5, 0.5, 0.1], [0.5, 0.25, 0.05], [0.5, 0.5 / 3, 0.025]]
    assert paths.stacked_points()[:3, 1, 0].tolist() == pytest.approx([1, 0.5, 0.375])


def test_a_function_that_only_a_checkpoint_names_is_not_imported(folder: Path, capsys: Any) -> None:
    """The path of a user's function is trusted if the same command names it, or with --trust."""
    (folder / "my_file.py").write_text("def f(w):\n    return (w**2).sum()\n")
    words = ["--model=Objective", "--model.function=my_file.f", "--trainer.max_steps=2"]
    assert main(["fit", *words, "--trainer.accelerator=cpu", "--trainer.name=first"]) == 0
    (checkpoint,) = Path("runs/first/version_0/checkpoints").glob("*.ckpt")
    resume = ["fit", f"--ckpt_path={checkpoint}", "--trainer.max_steps=4"]
    (folder / "my_file.py").write_text("raise SystemExit('this file was imported')\n")
    sys.modules.pop("my_file", None)
    assert main(resume) == 2
    assert "names 'my_file.f', which is not a class of Ravine; it is not" in capsys.readouterr().err
    (folder / "my_file.py").write_text("def f(w):\n    return (w**2).sum()\n")
    assert main([*resume, "--trust=my_file"]) == 0


def test_a_resumed_run_keeps_where_members_have_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def train(steps: int, path: str | None = None) -> tuple[Objective, dict[str, Any]]:
        module = Objective(start=[5.0], num_members=3, objective_target=1e-5)
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, callbacks=[sweep(0.1, 0.5, 0.9)], logger=False
        )
        trainer.fit(module, ckpt_path=path)
        trainer.save_checkpoint(f"{steps}.ckpt")
        return module, torch.load(f"{steps}.ckpt", weights_only=True)

    once, expected = train(20)
    train(8)
    resumed, found = train(20, "8.ckpt")
    assert resumed.stop_steps == once.stop_steps == [None, 11, 4]
    # a member that was stopped before the resumption has the state of one that has trained
    assert found["optimizer_states"][0]["state"].keys() == {0, 1, 2}
    assert found["optimizer_states"] == expected["optimizer_states"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preconditioners": [[1.0, 1.0]]}, "1 preconditioners and 2 members"),
        ({"preconditioners": [None, [1.0]]}, r"\[1.0\] is not a rate for each of 2 variables"),
        ({"preconditioners": [None, [1.0, 0.0]]}, "2 numbers above 0"),
        ({"preconditioners": [None, "valley"]}, "no preconditioner 'valley'.*allowed: ravine"),
        (
            {"preconditioners": ["ravine"], "num_members": 1, "function": "quadratic",
             "start": [5.0]},
            "no preconditioner 'ravine' of 1 variables.*allowed: 1 numbers",
        ),
    ],
)  # fmt: skip
def test_a_preconditioner_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        Objective(**({"function": "ravine", "start": [3.0, 3.0], "num_members": 2} | arguments))


def test_a_preconditioner_scales_each_coordinate_and_leaves_the_stop_rules_alone():
    """SGD with lr 1 and the rates (r_i) is w_i <- w_i - r_i g_i; the tolerance is that of |g|."""
    module = Objective(
        "quadratic", [4.0, 2.0], num_members=2, preconditioners=[[0.5, 0.25], None],
        gradient_tolerance=1.0,
    )  # fmt: skip
    points = run(module, 10, sweep(1.0, 1e-9)).stacked_points()
    assert points[:4, 0, 0].tolist() == pytest.approx([4 * 0.5**k for k in range(4)])
    assert points[:4, 0, 1].tolist() == pytest.approx([2 * 0.75**k for k in range(4)])
    assert module.stop_steps == [3, None]  # the norm there is 0.98, times the rates less
