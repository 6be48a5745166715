"""`accumulate_grad_batches=auto` finds the number that a search over all divisors finds."""

import random

import pytest

from ravine.cli import micro_batch_search
from ravine.cli.micro_batch_search import (
    MAX_TRIALS,
    Prediction,
    Trial,
    choose_accumulation,
    list_divisors,
    resolve_accumulation,
)
from ravine.errors import RunError, UsageError

COMMAND = ["fit", "--model=LanguageModel", "--data=TextDataModule"]
ESTIMATE = {
    "batch": {"samples": 8, "ranks": 2},
    "run": {
        "batch_size": 32,
        "divides_batch": True,
        "dp_size": 2,
        "strategy": "ddp",
        "gpu_bytes": None,
        "process_bytes": 2**29,
    },
    "layouts": [{"name": "ddp", "peak": 9 * 2**20, "bytes": {"activations": 8 * 2**20}}],
}


def search_all(batch_size: int, peak, limit: float) -> int | None:
    fitting = [n for n in list_divisors(batch_size) if peak(batch_size / n) <= limit]
    return min(fitting, default=None)


@pytest.mark.parametrize("is_killed", [False, True])
def test_three_trials_find_the_number_of_a_search_over_all_divisors(is_killed):
    generator = random.Random(0)
    for _ in range(2000):
        batch_size = generator.choice([1, 7, 12, 32, 48, 64, 96, 256, 480])
        fixed, sample = generator.uniform(50, 500), generator.uniform(1, 20)
        limit = generator.uniform(0.9, 1.1) * (fixed + sample * generator.uniform(1, batch_size))
        error, base_error = generator.uniform(0.95, 1.05), generator.uniform(-10, 10)
        prediction = Prediction(fixed + base_error, sample * error)
        trials = []

        def peak(samples, fixed=fixed, sample=sample):
            return fixed + sample * samples

        def run_trial(n, batch_size=batch_size, limit=limit, trials=trials, peak=peak):
            trials.append(n)
            size = peak(batch_size / n)
            fits = size <= limit
            # the kernel kills a process that exceeds its limit, and its peak is not known
            return Trial(fits, 0 if is_killed and not fits else round(size * 1000) / 1000)

        number = choose_accumulation(batch_size, prediction, limit, run_trial)
        assert number == search_all(batch_size, peak, limit)
        assert len(trials) <= MAX_TRIALS


def test_without_a_limit_the_micro_batch_is_halved_until_a_trial_fits():
    trials = []

    def run_trial(n):
        trials.append(n)
        return Trial(n >= 4)

    assert choose_accumulation(32, Prediction(0, 0), None, run_trial) == 4
    assert trials == [1, 2, 4]


def resolve(monkeypatch, argv, estimate=ESTIMATE, fits=lambda count: True):
    counts = []

    def run_steps(argv, count, limit):
        counts.append(count)
        return Trial(fits(count), 0)

    monkeypatch.setenv("RAVINE_MEMORY_LIMIT", "8")
    monkeypatch.setattr(micro_batch_search, "run_estimate", lambda argv: estimate)
    monkeypatch.setattr(micro_batch_search, "run_steps", run_steps)
    return resolve_accumulation(argv), counts


def test_the_number_takes_the_place_of_the_word(monkeypatch, capsys):
    flag = "--trainer.accumulate_grad_batches"
    for words in ([f"{flag}=auto"], [flag, "auto"]):
        argv, counts = resolve(monkeypatch, [*COMMAND, *words])
        assert argv == [*COMMAND, f"{flag}=1"]
        assert counts == [1]
    text = capsys.readouterr().out
    assert "accumulate_grad_batches=auto: 1, micro-batches of 16 samples in 4 GiB" in text
    assert "(RAVINE_MEMORY_LIMIT) (16 samples: fits)" in text


def test_a_number_is_not_changed(monkeypatch):
    argv = [*COMMAND, "--trainer.accumulate_grad_batches=4"]
    assert resolve(monkeypatch, argv) == (argv, [])
    assert resolve(monkeypatch, COMMAND) == (COMMAND, [])


@pytest.mark.parametrize("word", ["--print_config", "--print_config=comments", "--help=all"])
def test_a_command_that_runs_nothing_finds_no_number(word):
    words = [*COMMAND, "--trainer.accumulate_grad_batches=auto", word]
    assert resolve_accumulation(words) == [*COMMAND, word]


def test_where_auto_is_not_possible_a_line_says_what_to_type(monkeypatch):
    auto = "--trainer.accumulate_grad_batches=auto"
    with pytest.raises(UsageError, match="flag of fit without --ckpt_path"):
        resolve(monkeypatch, [*COMMAND, auto, "--ckpt_path=last"])
    with pytest.raises(UsageError, match="flag of fit"):
        resolve(monkeypatch, ["test", *COMMAND[1:], auto])
    plain = {**ESTIMATE, "run": {**ESTIMATE["run"], "divides_batch": False}}
    with pytest.raises(UsageError, match="needs a datamodule that divides its batch"):
        resolve(monkeypatch, [*COMMAND, auto], plain)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE says that another program"):
        resolve(monkeypatch, [*COMMAND, auto])


def test_if_nothing_fits_the_trials_are_listed(monkeypatch):
    argv = [*COMMAND, "--trainer.accumulate_grad_batches=auto"]
    with pytest.raises(RunError, match=r"no micro-batch fits in 4 GiB .*: does not fit"):
        resolve(monkeypatch, argv, fits=lambda count: False)
