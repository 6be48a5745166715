"""SMS Spam, a fifth held out, three splits: ours beside scikit-learn's logistic regression.

python benchmarks/spam.py     appends a raw row a run to rows/spam.jsonl; two minutes

The other classifier: sublinear tf-idf of words (1-2) and characters (3-5), C chosen by
cross-validation, on the same messages.
"""

import time

import numpy as np
from record import append, circumstances, train
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.pipeline import make_union

from ravine.datamodules import SpamDataModule

CS = [1, 5, 20, 80, 320]


def run_sklearn(seed: int) -> dict[str, float]:
    data = SpamDataModule(source="sms", val_fraction=0.0, seed=seed)
    data.setup("fit")
    text, label = (np.array(column) for column in list(zip(*data.messages, strict=True))[:2])
    train_part, test_part = data.splits["train"], data.splits["test"]
    start_s = time.perf_counter()
    features = make_union(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)),
        TfidfVectorizer(sublinear_tf=True, ngram_range=(3, 5), analyzer="char_wb"),
    )
    model = LogisticRegressionCV(
        Cs=CS, cv=5, scoring="accuracy", max_iter=1000, l1_ratios=(0,), use_legacy_attributes=False
    )
    model.fit(features.fit_transform(text[train_part]), label[train_part])
    probability = model.predict_proba(features.transform(text[test_part]))[:, 1]
    truth = label[test_part]
    return {
        "C": float(model.C_),
        "seconds": round(time.perf_counter() - start_s, 2),
        "test/accuracy": float(accuracy_score(truth, probability > 0.5)),
        "test/f1": float(f1_score(truth, probability > 0.5)),
        "test/auroc": float(roc_auc_score(truth, probability)),
    }


def main() -> None:
    for seed in range(3):
        append("spam", train("spam", seed, f"--data.seed={seed}", test=True))
        row = circumstances("spam") | {"config": "scikit-learn", "seed": seed} | run_sklearn(seed)
        append("spam", row)


if __name__ == "__main__":
    main()
