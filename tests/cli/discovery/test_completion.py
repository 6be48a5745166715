"""Completion of command lines: the words that may come next, and the script of bash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ravine.cli import help_text, main
from ravine.cli.config import presets
from ravine.cli.discovery.completion import RUNS_VERBS, complete_line

COMMANDS = (*main.COMMANDS, *main.LOOKUP_COMMANDS)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a config and a class of the user."""
    (tmp_path / "mine.yaml").write_text("model: LanguageModel\n")
    (tmp_path / "own.py").write_text("import lightning as L\nclass Mine(L.Callback): ...\n")
    (tmp_path / "runs" / "mine" / "version_0" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def complete(line: str) -> list[str]:
    return complete_line(line, COMMANDS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lightning ", sorted(COMMANDS)),
        ("lightning comp", ["completion"]),
        ("lightning fit --config spam/", ["spam/lecture0", "spam/quick"]),
        ("lightning fit -c mi", ["mine.yaml"]),
        ("lightning fit --config=strategy/zero", [f"--config=strategy/zero{i}" for i in (1, 2, 3)]),
        ("lightning fit --config ru", ["runs/"]),
        ("lightning list sa", ["samplers"]),
        ("lightning list samplers ", []),
        ("lightning show EM", ["EMA", "EMAWeightAveraging"]),
        ("lightning show own", ["own.Mine"]),
        ("lightning new o", ["optimizer"]),
        ("lightning completion ", ["bash", "zsh"]),
        ("lightning fit --model=Sp", ["--model=SpamClassifier"]),
        ("lightning fit --data=Im", ["--data=ImageDataModule"]),
        ("lightning fit --trainer.callbacks+=Mu", ["--trainer.callbacks+=Muon"]),
        ("lightning fit --trainer.callbacks+=own", ["--trainer.callbacks+=own.Mine"]),
        ("lightning fit --trainer.strategy=h", ["--trainer.strategy=hsdp"]),
        ("lightning fit --ckpt_path=a", ["--ckpt_path=auto"]),
        ("lightning fit --ckpt_path b", ["best"]),
        ("lightning test --ckpt_path mi", ["mine/0", "mine.yaml"]),
        ("lightning fit --model Sp", ["SpamClassifier"]),
        ("lightning fit --allow_changed_data --ckpt_path=b", ["--ckpt_path=best"]),
        ("lightning runs show mi", ["mine/0", "mine.yaml"]),
        ("lightning runs compare la", ["last"]),
        ("lightning runs clean ch", ["checkpoints"]),
        ("lightning fit --config spam --ckpt_path=ru", ["--ckpt_path=runs/"]),
        ("lightning fit --trainer.callbacks+=EMA --trainer.callbacks.d",
         ["--trainer.callbacks.decay="]),
        ("lightning fit --trainer.callbacks+=OptimizerPlan --trainer.callbacks.optimizer=Lio",
         ["--trainer.callbacks.optimizer=LionOptimizer"]),
        ("lightning fit --config shakespeare/quick --trainer.callbacks.Mu",
         ["--trainer.callbacks.Muon."]),
        ("lightning fit --config shakespeare/quick --trainer.callbacks.Muon.sc",
         ["--trainer.callbacks.Muon.scale=", "--trainer.callbacks.Muon.schedule.",
          "--trainer.callbacks.Muon.schedule="]),
        ("lightning fit --config shakespeare/quick --trainer.callbacks.Muon.aux_optimizer.l",
         ["--trainer.callbacks.Muon.aux_optimizer.lr="]),
        ("lightning fit --config shakespeare/quick --trainer.callbacks.Muon.schedule.war",
         [f"--trainer.callbacks.Muon.schedule.warmup{end}=" for end in ("", "_from_zero")]),
        ("lightning fit --config shakespeare/quick --trainer.callbacks.Muon.aux_optimizer=SG",
         ["--trainer.callbacks.Muon.aux_optimizer=SGD"]),
        ("lightning fit --config shakespeare/quick --trainer.callbacks.Muon.coefficients=p",
         ["--trainer.callbacks.Muon.coefficients=polar_express"]),
        ("lightning fit --config spam --trainer.callbacks+=EMA --trainer.callbacks.E",
         ["--trainer.callbacks.EMA."]),
        ("lightning fit --config spam --optimizer.nest", ["--optimizer.nesterov="]),
        ("lightning fit --config spam --optimizer=Mu",
         ["--optimizer=Muon", "--optimizer=MuonOptimizer"]),
        ("lightning fit --config spam --optimizer=RMSprop --optimizer.alp", ["--optimizer.alpha="]),
        ("lightning fit --config shakespeare/quick --schedule.fin", ["--schedule.final_fraction="]),
        ("lightning fit --config spam --sch", ["--schedule."]),
        ("lightning fit --config spam/quick --model.hid", ["--model.hidden_size="]),
        ("lightning fit --config spam/quick --model.features=n", ["--model.features=ngrams"]),
        ("lightning fit --config mine.yaml --model.qk_norm=t", ["--model.qk_norm=true"]),
        ("lightning fit --config diffusion/digits --data.source=mn", ["--data.source=mnist"]),
        ("lightning fit --config reinforce/quick --model.kl.be", ["--model.kl.beta="]),
        ("lightning fit --config reinforce/quick --model.rewards+=Li",
         ["--model.rewards+=LineLength"]),
        ("lightning test --trainer.max_st", ["--trainer.max_steps="]),
        ("lightning generate --top", ["--top_k=", "--top_p="]),
        ("lightning export --form", ["--format="]),
        ("lightning runs co", ["compare"]),
        ("lightning runs compare ru", ["runs/"]),
        ("lightning runs --sta", ["--status="]),
        ("lightning fit --nothing.x", []),
        ("lightning fit --config nowhere --model.", []),
        ("lightning nothing ", []),
        ("lightning fit --config 'open", []),
    ],
)  # fmt: skip
def test_a_line_is_completed(line: str, words: list[str]) -> None:
    found = complete(line)
    assert [word for word in found if word not in ("--debug", "--help")] == words


def test_the_verbs_of_runs_are_those_of_its_page() -> None:
    page = help_text.help_text("runs", "lightning")
    assert all(f"  runs {verb} " in page for verb in RUNS_VERBS)


def test_all_presets_complete_a_config() -> None:
    assert set(complete("lightning fit --config ")) == {*presets.list_presets(), "mine.yaml"}


def test_flags_are_offered_level_by_level() -> None:
    flags = complete("lightning fit --")
    assert {"--config=", "--model=", "--model.", "--trainer."} <= {*flags}
    assert not any(flag.startswith("--trainer.m") for flag in flags)
    below = complete("lightning fit --trainer.")
    assert {"--trainer.max_steps=", "--trainer.callbacks+=", "--trainer.name="} <= {*below}


def test_a_script_of_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["completion", "fish"]) == 2
    assert main.main(["completion"]) == 2
    assert main.main(["completion", "bash", "zsh"]) == 2
    assert "allowed: bash, zsh" in capsys.readouterr().err


# Calls the function as bash does: it splits words at = and :.
TAB = """
complete() { :; }; compopt() { echo "option: $1 $2"; }
eval "$(ravine completion bash)"
COMP_LINE="$1"; COMP_POINT=${#1}; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_ravine_complete ravine
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ravine", "fit", "--config", "spam/q"], ["spam/quick"]),
        (["ravine", "fit", "--config=spam/q"], ["spam/quick"]),
        (["ravine", "fit", "--trainer.callbacks+=EM"], ["EMA", "EMAWeightAveraging"]),
        (["ravine", "test", "--ckpt_p"], ["option: -o nospace", "--ckpt_path="]),
    ],
)
def test_the_script_of_bash_completes_the_word_at_the_cursor(
    words: list[str], expected: list[str]
) -> None:
    split = [part for w in words for part in w.replace("=", " = ").split()]  # as bash does
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", TAB, "tab", " ".join(words), *split],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.split("\n")[:-1] == expected, done.stderr
