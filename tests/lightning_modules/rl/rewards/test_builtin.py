"""Reward terms against counts by hand, and the metrics beside them."""

import copy
import itertools
import math
import random
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch

from ravine.datamodules.tokenizers import CharTokenizer
from ravine.lightning_modules import (
    BatchDistance,
    CharacterDiversity,
    CharacterFraction,
    LineLength,
    ReferenceLogprob,
    RewardFunction,
    SpeakerDiversity,
    Threshold,
    UniqueWords,
    VocabularyFraction,
    WordUniqueness,
)
from ravine.lightning_modules.generation.generate_text import GenerationOutput
from ravine.lightning_modules.rl.advantages import AdvantageEstimator
from ravine.lightning_modules.rl.kl import KL
from ravine.lightning_modules.rl.metrics import (
    reward_metrics,
    text_metrics,
    token_metrics,
    token_statistics,
)
from ravine.lightning_modules.rl.rewards import builtin
from ravine.lightning_modules.rl.rewards.base import (
    CorpusStats,
    Reward,
    RewardError,
    RewardInputs,
    check_rewards,
    check_scored,
    score_all,
    weighted_sum,
)
from ravine.lightning_modules.rl.scoring import RolloutScorer
from ravine.lightning_modules.rl.text_similarity import (
    mean_pairwise_distance,
    nearest_distance,
    pairwise_jaccard_distance,
)

PLAY = (
    "ROMEO:\nO speak again, bright angel.\n\nJULIET:\nGood night, good night.\n\nFirst Lord:\nHo!\n"
)


class Count(Reward):
    def score(self, samples: RewardInputs) -> list[float]:
        return [float(len(text)) for text in samples.texts]


def samples(*texts: str, all_texts: tuple[str, ...] | None = None, first: int = 0) -> RewardInputs:
    n = max(map(len, texts)) or 1
    mask = torch.tensor([[i < len(text) for i in range(n)] for text in texts])
    said = -torch.arange(1.0, n + 1).repeat(len(texts), 1)
    return RewardInputs(
        ["p"] * len(texts), list(texts), mask.long(), mask, said, said,
        corpus_stats=CorpusStats(PLAY), all_texts=list(all_texts or texts), rank_offset=first,
    )  # fmt: skip


def score(term: Reward, *texts: str) -> list[float]:
    return score_all([term], samples(*texts))[0].tolist()


def test_text_after_the_end_is_not_scored() -> None:
    """Padding is token 0, which is a character: of a text that met the end, or the stop."""
    tokenizer = CharTokenizer("!.abc")
    tokenizer.eos_id = 4
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    tokens = torch.tensor([[2, 3, 4, 0], [2, 1, 0, 0], [2, 3, 2, 0]])
    terms = [RewardFunction(lambda texts: map(len, texts), name="length")]
    how = AdvantageEstimator("none"), KL(), 4, 1, tokenizer, ".", None, lambda x: x, 0
    scored = RolloutScorer(terms, *how)(
        list("pqr"), {}, GenerationOutput(tokens, -mask.float(), mask), None, None
    )
    assert [row["text"] for row in scored.rows] == ["ab", "a", "aba!"]
    assert scored.advantages.tolist() == [2, 1, 4]
    assert scored.tokens_per_rank == 9


TERMS: list[tuple[Reward, list[str], list[float]]] = [
    (CharacterFraction("eE"), ["eEx.", "", "abc"], [0.5, 0, 0]),
    (VocabularyFraction(), ["speak again now", "angel angel.", " "], [1 / 3, 0.5, 0]),
    (UniqueWords(), ["a b a", "", "a"], [2 / 3, 0, 1]),
    (CharacterDiversity(2), ["ababa", "a", "abc"], [0.5, 0, 1]),
    (WordUniqueness(3), ["a b c a b c", "a b", "a b c"], [0.75, 0, 1]),
    (LineLength(10), ["12345\n\n1234567", "", "x" * 30], [0.6, 0, 1]),
    (ReferenceLogprob(), ["ab", "abcd"], [-1.5, -2.5]),
    (Threshold(CharacterFraction("e"), max_value=0), ["xyz", "xez"], [1, 0]),
    (Threshold(UniqueWords(), min_value=0.5, max_value=0.9), ["a b a", "a b", "a a a"], [1, 0, 0]),
]


def test_every_term_has_a_row_here_or_a_test_of_its_own() -> None:
    names = {type(term).__name__ for term, *_ in TERMS}
    assert names | {"SpeakerDiversity", "BatchDistance"} == set(builtin.__all__)


@pytest.mark.parametrize(("term", "texts", "exact"), TERMS, ids=lambda x: getattr(x, "name", ""))
def test_a_term_is_its_formula(term: Reward, texts: list[str], exact: list[float]) -> None:
    assert score(term, *texts) == pytest.approx(exact)


def test_a_speaker_counts_if_it_is_known_and_has_enough_words() -> None:
    text = "ly.\n\nROMEO:\nI have said enough words here.\n\nNobody:\nI am in no play, but talk.\n"
    text += "\nJULIET:\nNo.\n"
    longer = text.replace("No.", "No, and no, and no, and no.")
    assert score(SpeakerDiversity(2), text, longer) == [0.5, 1]
    assert CorpusStats(PLAY).speakers == {"ROMEO", "JULIET", "First Lord"}


def jaccard(one: str, other: str, n: int) -> float:
    sets = [
        {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
        for words in (one.split(), other.split())
    ]
    either = sets[0] | sets[1]
    return 1 - len(sets[0] & sets[1]) / len(either) if either else 0.0


def test_distances_of_a_batch_are_those_of_all_pairs() -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abc", k=draw.randrange(12))) for _ in range(30)] + ["", "a b"]
    for n in (1, 2, 4):
        distances = pairwise_jaccard_distance(texts, n)
        for i, j in itertools.combinations(range(len(texts)), 2):
            assert (
                distances[i, j] == distances[j, i] == pytest.approx(jaccard(texts[i], texts[j], n))
            )
        assert not np.diag(distances).any()
        nearest = [min(distances[i, j] for j in range(32) if j != i) for i in range(32)]
        assert nearest_distance(distances).tolist() == nearest
        pairs = [distances[i, j] for i, j in itertools.combinations(range(32), 2)]
        assert mean_pairwise_distance(distances) == pytest.approx(sum(pairs) / len(pairs))


def test_texts_are_compared_with_those_of_all_ranks_and_scored_for_their_own_rank() -> None:
    all_texts = ("a b c d", "e f g h", "a b c d", "i j k l")
    inputs = samples("a b c d", "i j k l", all_texts=all_texts, first=2)
    assert BatchDistance(4).score(inputs) == [0.0, 1.0]
    with pytest.raises(RewardError, match=r"has only one; .*; use PromptDataModule\(batch_size=64"):
        BatchDistance().score(samples("alone"))


def test_terms_are_added_by_weight_and_none_excludes_a_sample() -> None:
    terms = [
        CharacterFraction("e", -2.0),
        RewardFunction(lambda texts: [None, 3.0], weight=0.5, name="mine"),
        RewardFunction(lambda texts: [None, None], weight=0.0, name="watched"),
    ]
    total = weighted_sum(terms, score_all(terms, samples("eeee", "ex")))
    assert total.isnan().tolist() == [True, False]
    assert total[1] == -2 * 0.5 + 0.5 * 3


def test_a_binary_term_names_the_nan_of_its_inner_term_and_excludes_no_sample() -> None:
    broken = RewardFunction(lambda texts: [1.0, float("nan")], name="mine")
    with pytest.raises(RewardError, match="the reward mine is nan for sample 1"):
        score(Threshold(broken, min_value=0.5), "a", "b")
    partly = RewardFunction(lambda texts: [1.0, None], name="mine")
    assert np.isnan(score(Threshold(partly, min_value=0.5), "a", "b")).tolist() == [False, True]


def test_text_metrics_equal_their_counts() -> None:
    found = text_metrics(["O speak", "O speak", "again yonder"], CorpusStats(PLAY))
    assert found["frac_unique_texts"] == pytest.approx(2 / 3)
    assert found["frac_in_vocab"] == pytest.approx(4 / 6)
    assert found["num_unique_words"] == 4
    found = text_metrics(["a b c d", "a b c d", "e f g h"], None)
    assert found["jaccard_distance_mean"] == pytest.approx(2 / 3)
    assert found["jaccard_distance_nearest"] == pytest.approx(1 / 3)
    assert "frac_in_vocab" not in found


def test_token_metrics_are_means_over_the_generated_tokens() -> None:
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -1.0, -9.0]])
    mask = torch.tensor([[True, True, False]])
    found = token_metrics(
        token_statistics(GenerationOutput(mask.long(), logprobs, mask), ref_logprobs, KL(), 3), True
    )
    k3 = math.exp(-0.5) - 1 + 0.5 + math.exp(1.0) - 1 - 1
    exact = {"entropy": 1.5, "num_tokens": 2, "kl": (0.5 - 1.0) / 2, "kl_k3": k3 / 2}
    assert found == pytest.approx(exact)
    assert "kl" not in token_metrics(
        token_statistics(GenerationOutput(mask.long(), logprobs, mask), None, KL(), 3), False
    )


def test_mean_and_deviation_of_a_term_are_over_the_samples_that_it_scored() -> None:
    term, scores = RewardFunction(lambda texts: [], name="mine"), torch.tensor([0.0, math.nan, 4.0])
    found = reward_metrics([term], scores[None], scores)
    exact = {"mine": 2, "mine_std": 2, "reward": 2, "reward_std": 2}
    assert found == exact
    nothing = torch.full((1, 3), math.nan)
    with pytest.raises(RewardError, match="mine is None for all 3 samples"):
        check_scored([term], nothing)
    term.weight = 0.0
    check_scored([term], nothing)  # of what is watched only
    assert reward_metrics([term], nothing, scores) == {"reward": 2, "reward_std": 2}


BLIND = {
    "no bound": (
        lambda: Threshold(UniqueWords()),
        "Threshold: min_value and max_value are both None",
    ),
    "bounds the wrong way": (
        lambda: Threshold(UniqueWords(), 0.9, 0.1),
        "min_value=0.9 is larger than max_value=0.1",
    ),
    "no character": (lambda: CharacterFraction(""), "characters='', so .* use characters='eE'"),
    "runs of no word": (
        lambda: WordUniqueness(0),
        "the reward word_uniqueness has n=0, .* allowed",
    ),
    "runs of -1": (lambda: BatchDistance(-1), r"has n=-1, .* allowed: 1 or more; use n=3"),
    "runs of no character": (
        lambda: CharacterDiversity(0),
        "the reward character_diversity has n=0",
    ),
    "lines of no length": (lambda: LineLength(0), r"has target_length=0, .* use target_length=3"),
    "no speaker": (
        lambda: SpeakerDiversity(0),
        "the reward speaker_diversity has target_count=0",
    ),
}


@pytest.mark.parametrize("term", BLIND)
def test_a_term_without_input_is_refused(term: str) -> None:
    make, message = BLIND[term]
    with pytest.raises(RewardError, match=message):
        make()


@pytest.mark.parametrize("term", [VocabularyFraction(), SpeakerDiversity()])
def test_a_corpus_in_which_a_term_finds_nothing_is_refused(term: Reward) -> None:
    seen = samples("O speak")
    seen.corpus_stats = CorpusStats("\n \n")
    message = rf"reward {term.name} is 0 for every text, .* no (words|speakers).*corpus_path=FILE\)"
    with pytest.raises(RewardError, match=message):
        score_all([term], seen)


def test_a_reward_that_changes_its_arguments_does_not_affect_others() -> None:
    def takes(texts, prompts, tokens, mask, logprobs, facts) -> list[float]:
        scores = [float(len(text)) for text in texts]
        for each in (texts, prompts, facts[0]):
            each.clear()
        for each in (tokens, mask, logprobs):
            each.zero_()
        return scores

    seen = samples("one", "three")
    seen.columns = {"facts": [{"answer": 1}, {"answer": 2}]}
    before = copy.deepcopy(seen)
    first, second = (RewardFunction(takes, name=name) for name in ("first", "second"))
    assert score_all([first, second], seen).tolist() == [[3, 5], [3, 5]]
    for name in ("texts", "prompts", "columns"):
        assert getattr(seen, name) == getattr(before, name)
    for name in ("tokens", "mask", "logprobs"):
        assert getattr(seen, name).equal(getattr(before, name))


def test_a_data_column_with_a_reserved_name_is_refused() -> None:
    seen = samples("a")
    seen.columns = {"texts": ["of the file"]}
    with pytest.raises(RewardError, match=r"a column 'texts'.*rename the column"):
        score_all([RewardFunction(lambda texts: [1.0])], seen)


NO_FUNCTION = {
    "own.lenght": r"own has no such function; allowed: own.length, own.other; .*'own\.length'",
    "own.LIMIT": r"it is 3, not a function; allowed: own\..*, own\..*; use function='own\.",
    "onw.length": r"there is no file onw\.py; allowed: own\.py.*; use function='own\.length'",
    "own": r"the path names no file, .*; allowed: my_file\.my_function; .*'own\.reward'",
    ".own": r"the path names no file, .*; allowed: my_file\.my_function; .*'own\.reward'",
    "torn.reward": r"importing torn raises ValueError: two lines; correct the file",
}
OWN = """
LIMIT = 3
def length(texts): return [len(text) for text in texts]
def other(texts): return []
"""


@pytest.mark.parametrize("path", NO_FUNCTION)
def test_a_missing_reward_function_is_an_error_in_one_line(
    path: str, tmp_path, monkeypatch
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "torn.py").write_text("raise ValueError('two\\nlines')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own", None)
    message = rf"the reward function {path} (does not exist|cannot be imported): "
    with pytest.raises(RewardError, match=message + NO_FUNCTION[path]) as e:
        RewardFunction(path)
    assert re.match(r"--model\.rewards\.function=own\.|python -c \"import torn\"", e.value.flag)
    assert "\n" not in str(e.value)
    assert RewardFunction("own.length").score(samples("a", "bcd")) == [1, 3]


def test_the_error_for_a_reward_that_is_not_a_number_names_the_sample() -> None:
    def reward_fn(texts: list[str]) -> list[str]:
        return [text if text == "two" else "1" for text in texts]

    message = r"failed on sample 1 \('two'\): ValueError: could not convert[^()]*; correct the"
    with pytest.raises(RewardError, match=message):
        score(RewardFunction(reward_fn), "one", "two")


NO_LIST = {
    "dict": lambda texts: {i: 5.0 for i in range(len(texts))},
    "str": lambda texts: "01"[: len(texts)],
    "bytes": lambda texts: b"01",
    "set": lambda texts: {1.0, 0.0},
    "dict_keys": lambda texts: {1.0: 2, 0.0: 3}.keys(),
}


@pytest.mark.parametrize("kind", NO_LIST)
def test_rewards_in_a_container_without_numbers_in_order_are_refused_in_one_line(kind) -> None:
    message = rf"the reward mine returned a {kind}; allowed: a list or a tensor.*; return \["
    with pytest.raises(RewardError, match=message) as error:
        score(RewardFunction(NO_LIST[kind], name="mine"), "one", "two")
    assert "\n" not in str(error.value)


def test_a_reward_that_float32_cannot_hold_is_refused_with_its_term_and_sample() -> None:
    for value in (1e39, -1e39, 10**40):
        term = RewardFunction(lambda texts, v=value: [0.5, v], name="huge")
        with pytest.raises(
            RewardError, match=r"the reward huge is -?1e\+\d+ for sample 1 \('two'\)"
        ):
            score(term, "one", "two")
    terms = [Count(weight=1e30, name="much"), Count(name="little")]
    with pytest.raises(RewardError, match=r"sample 1 is 1e\+39, mainly from much with weight"):
        weighted_sum(terms, torch.tensor([[1, 1e9], [1, 1]], dtype=torch.float64))


def test_a_weight_that_is_not_a_number_is_refused() -> None:
    for weight in (math.nan, math.inf):
        with pytest.raises(RewardError, match=r"reward count has weight=(nan|inf); allowed: a fin"):
            check_rewards([Count(weight=weight)], has_corpus=True, has_reference=True)


def test_terms_that_cancel_add_up_to_zero() -> None:
    terms = [Count(weight=w, name=f"t{w}") for w in (0.1, 0.2, -0.3)]
    answers = torch.tensor([[1, 0], [1, 0], [1, 0]], dtype=torch.float64)
    assert weighted_sum(terms, answers).tolist() == [0, 0]
    assert weighted_sum(terms, 0.5 * answers + torch.tensor([[1e-9], [0], [0]])).abs().min() > 1e-11


def test_a_function_written_for_trl_gets_the_texts_as_completions() -> None:
    seen: dict[str, Any] = {}

    def trl(completions, **kwargs):
        seen.update(kwargs)
        return [float(len(text)) for text in completions]

    batch = samples("one", "seven")
    batch.columns = {"answer": ["1", "2"]}
    assert score_all([RewardFunction(trl)], batch).tolist() == [[3, 5]]
    assert seen["prompts"] == batch.prompts
    assert seen["answer"] == ["1", "2"]
    rows = [t[m].tolist() for t, m in zip(batch.tokens, batch.mask, strict=True)]
    assert seen["completion_ids"] == rows
    named = RewardFunction(
        lambda prompts, completions, completion_ids: [len(x) for x in completions]
    )
    assert score(named, "one", "seven") == [3, 5]
    batch.columns = {"completions": ["written", "by someone"]}
    with pytest.raises(RewardError, match=r"a column 'completions'.*rename the column"):
        score_all([RewardFunction(trl)], batch)
    whole = RewardFunction(lambda **columns: [len(text) for text in columns["completions"]])
    assert score_all([whole], batch).tolist() == [[7, 10]]


def test_a_missing_argument_is_named_even_if_the_function_takes_keyword_arguments() -> None:
    with pytest.raises(
        RewardError, match=r"has the argument 'completion', .*; allowed: texts, prompts"
    ):
        score(RewardFunction(lambda completion, **rest: [1.0], name="f"), "a")
    assert score(RewardFunction(lambda texts, /, *others, **rest: [2.0], name="g"), "a") == [2]


def test_the_line_of_a_reward_that_fails_is_named() -> None:
    def reward_fn(texts: list[str]) -> list[float]:
        raise KeyError

    line = reward_fn.__code__.co_firstlineno + 1
    said = rf"failed on sample 0 \('a'\): KeyError \(test_builtin\.py:{line}\); corr"
    with pytest.raises(RewardError, match=said):
        score(RewardFunction(reward_fn), "a")
