"""The spam classifier: features counted by hand, tf-idf as scikit-learn has it, and it learns."""

import functools
import math
import zlib
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from ravine.callbacks import OptimizerPlan
from ravine.datamodules import SpamDataModule
from ravine.lightning_modules import SpamClassifier
from ravine.lightning_modules.spam_classifier import (
    HashedLinear,
    compute_idf,
    extract_ngrams,
    handcrafted_features,
    hash_ngrams,
)

MESSAGES = [
    "URGENT! You won 1000 pounds, call 0906 555 now now now",
    "see you at 7, bring the urn",
    "ok",
    "¿Dónde estás? llámame",
    "the the the cat",
]
BUCKETS = 2**22  # collisions would blur a comparison of 300 n-grams in 2^18


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fit_and_test(
    model: SpamClassifier, lr: float, steps: int, data: SpamDataModule | None = None
) -> tuple[dict[str, float], L.Trainer]:
    data = data or SpamDataModule(source="embedded", batch_size="all", val_fraction=0.0)
    plan = OptimizerPlan(functools.partial(torch.optim.SGD, lr=lr), decay="none")
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[plan], num_sanity_val_steps=0, **quiet
    )
    trainer.fit(model, data)
    return trainer.test(model, data, verbose=False)[0], trainer


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("", [0, 0, 0, 0, 0]),
        ("URGENT!!! buy, BUY now", [3, 2, 0, 9 / 22, 22 / 500]),
        ("go to www.x.example or WWW.y.example", [0, 0, 2, 3 / 36, 36 / 500]),
        ("freedom is wonderful", [0, 0, 0, 0, 20 / 500]),
        ("free money won? Won!", [1, 3, 0, 1 / 20, 20 / 500]),
    ],
)
def test_the_features_of_the_lecture_equal_a_count_by_hand(message, expected):
    assert handcrafted_features(message) == pytest.approx(expected)


def test_ngrams_are_scikit_learns_with_one_digit():
    def fold(message: str) -> str:
        return "".join("0" if c.isdecimal() else c for c in message.lower())

    words = TfidfVectorizer(ngram_range=(1, 2), preprocessor=fold).build_analyzer()
    pieces = TfidfVectorizer(
        ngram_range=(3, 5), analyzer="char_wb", preprocessor=fold
    ).build_analyzer()
    for message in MESSAGES:
        actual = extract_ngrams(message)
        assert sorted(actual[0]) == sorted(words(message))
        assert sorted(actual[1]) == sorted(pieces(message))


def test_a_hashed_linear_layer_is_scikit_learns_tfidf_times_its_weights():
    fitted, new = MESSAGES[:4], [*MESSAGES, "unseen words and the urn", ""]
    layer = HashedLinear(compute_idf(fitted, BUCKETS), 2, std=1.0).double()
    expected = np.zeros((len(new), 2))
    for kind in (0, 1):  # words, pieces
        vectorizer = TfidfVectorizer(
            analyzer=lambda m, k=kind: extract_ngrams(m)[k], sublinear_tf=True
        )
        rows = vectorizer.fit(fitted).transform(new).toarray()
        grams = vectorizer.get_feature_names_out()
        buckets = [zlib.crc32(gram.encode(), kind) % BUCKETS for gram in grams]
        expected += rows @ layer.weight.detach().numpy()[buckets]
    assert layer(new).detach().numpy() == pytest.approx(expected, abs=1e-6)


def test_features_of_no_training_message_have_weight_zero():
    idf = compute_idf(["abc"], BUCKETS)
    assert (idf[hash_ngrams("xyz", BUCKETS)[0]] == 0).all()
    assert idf[hash_ngrams("abc", BUCKETS)[0]] == pytest.approx(1.0)
    assert idf.count_nonzero() == len(hash_ngrams("abc", BUCKETS)[0])


def test_messages_do_not_influence_each_other():
    layer = HashedLinear(compute_idf(MESSAGES, 2**12), 1, std=1.0)
    torch.testing.assert_close(layer(MESSAGES), torch.cat([layer([m]) for m in MESSAGES]))


@pytest.mark.parametrize("features", ["handcrafted", "ngrams"])
@pytest.mark.parametrize("hidden", [0, 3])
def test_an_untrained_linear_model_has_zero_logits_and_its_size_is_the_formula(features, hidden):
    model = SpamClassifier(features, hidden, num_buckets=64)
    model.configure_model()
    width = 5 if features == "handcrafted" else 64
    out = hidden or 1
    expected = width * out + out + (hidden + 1 if hidden else 0)
    assert sum(p.numel() for p in model.parameters()) == expected
    logits = model(MESSAGES)
    assert logits.shape == (len(MESSAGES), 1)
    if features == "ngrams" and not hidden:
        assert (logits == 0).all()


def test_lecture_0_is_reproduced_nine_of_ten_unseen_messages_are_right():
    for seed in range(3):
        torch.manual_seed(seed)
        report, _ = fit_and_test(SpamClassifier("handcrafted"), lr=0.1, steps=200)
        assert report["test/accuracy"] >= 0.9
        right = report["test/true_negatives"] + report["test/true_positives"]
        assert right == pytest.approx(10 * report["test/accuracy"])
        assert report["test/auroc"] >= 0.9


def test_ngrams_learn_the_training_messages_and_generalise():
    model = SpamClassifier(num_buckets=2**14)
    report, trainer = fit_and_test(model, lr=30.0, steps=40)
    assert report["test/accuracy"] >= 0.8  # a constant answer gets half
    data = trainer.datamodule
    rows = model.predict_step({"message": data.train_messages}, 0)
    labels = [("ham", "spam")[data.messages[i].label] for i in data.splits["train"]]
    assert [label for *_, label in rows] == labels
    assert [message for _, message, _, _ in rows] == data.train_messages
    assert all((p > 0.5) == (label == "spam") for _, _, p, label in rows)


def test_metrics_are_those_of_the_predictions():
    model = SpamClassifier("handcrafted")
    report, trainer = fit_and_test(model, lr=0.1, steps=3)
    data = trainer.datamodule
    messages = [data.messages[i] for i in data.splits["test"]]
    said = [
        label == "spam"
        for *_, label in model.predict_step({"message": [m.text for m in messages]}, 0)
    ]
    truth = [bool(m.label) for m in messages]
    hits = sum(s and t for s, t in zip(said, truth, strict=True))
    assert report["test/accuracy"] == pytest.approx(np.mean(np.equal(said, truth)))
    assert report["test/f1"] == pytest.approx(2 * hits / max(1, sum(said) + sum(truth)))
    assert report["test/true_positives"] == hits
    assert report["test/false_positives"] == sum(said) - hits


def test_a_checkpoint_alone_restores_the_probabilities(tmp_path):
    model = SpamClassifier(num_buckets=2**12, hidden_size=4)
    _, trainer = fit_and_test(model, lr=1.0, steps=20)
    trainer.save_checkpoint(tmp_path / "spam.ckpt")
    loaded = SpamClassifier.load_from_checkpoint(tmp_path / "spam.ckpt")
    batch = {"message": MESSAGES}
    assert loaded.predict_step(batch, 0) == model.predict_step(batch, 0)
    assert not math.isclose(loaded.predict_step(batch, 0)[0][2], 0.5, abs_tol=1e-3)


@pytest.mark.parametrize("absent", ["ham", "spam"])
def test_undefined_scores_are_nan_and_one_line_names_them(absent, caplog):
    data = SpamDataModule(source="embedded", batch_size=5, val_fraction=0.0)
    data.setup("test")
    label = ("ham", "spam").index(absent)
    data.splits["test"] = [i for i in data.splits["test"] if data.messages[i].label != label]
    model = SpamClassifier("handcrafted")
    model.configure_model()
    with torch.no_grad():
        model.net[1].weight.zero_()
        model.net[1].bias.fill_(-1.0)  # it calls nothing spam
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        report = trainer.test(model, data, verbose=False)[0]
    assert math.isnan(report["test/auroc"])
    assert math.isnan(report["test/f1"]) == (absent == "spam")
    assert report["test/accuracy"] == (absent == "spam")
    said = [r.getMessage() for r in caplog.records if "undefined" in r.getMessage()]
    names = "test/f1 and test/auroc" if absent == "spam" else "test/auroc"
    assert [text.replace("test/auroc and test/f1", "test/f1 and test/auroc") for text in said] == [
        f"{names}: undefined, so NaN: no {absent} among the 5 test messages"
    ]


@pytest.mark.parametrize("wrong", [{"hidden_size": -1}, {"num_buckets": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"allowed: hidden_size: 0 or more, .*; use hidden_size=0"):
        SpamClassifier(**wrong)
