"""Spam classifier: logistic regression or MLP, on five handcrafted features (lecture 0) or n-grams.

The n-grams are words (one or two) and characters (three to five), hashed into a fixed number of
buckets, so no vocabulary is stored. They are weighted by sublinear tf-idf:

    weight = (1 + ln count) (1 + ln((1 + messages) / (1 + messages with it))),  then unit length

Axes: b batch, n n-grams of all messages of a batch, concatenated.
"""

import re
import zlib
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryConfusionMatrix,
    BinaryF1Score,
)

from ravine.errors import UsageError

from .task_module import TaskModule

TRIGGER_WORDS = {"urgent", "buy", "money", "won", "free"}
LABELS = ("ham", "spam")
# of the confusion matrix, whose rows are the true labels; spam is the positive class
CONFUSION_NAMES = ("true_negatives", "false_positives", "false_negatives", "true_positives")


def handcrafted_features(message: str) -> list[float]:
    """Return the lecture's features: `!`, trigger words, www, share of capitals, length / 500."""
    return [
        message.count("!"),
        len(TRIGGER_WORDS.intersection(re.findall(r"\w+", message.lower()))),
        sum("www" in token for token in message.lower().split()),
        sum(map(str.isupper, message)) / max(1, len(message)),
        len(message) / 500,
    ]


def extract_ngrams(message: str) -> tuple[list[str], list[str]]:
    """Return words with word pairs, and character n-grams of 3 to 5 within words.

    All digits are mapped to 0, so that all telephone numbers of one format are equal. A token is
    padded by a space on each side, so that its beginning and its end differ from its inside.
    """
    text = re.sub(r"\d", "0", message.lower())
    words = re.findall(r"\w\w+", text)
    pairs = [f"{first} {second}" for first, second in pairwise(words)]
    char_ngrams = []
    for token in text.split():
        padded = f" {token} "
        for size in (3, 4, 5):
            char_ngrams += [padded[i : i + size] for i in range(max(1, len(padded) - size + 1))]
            if len(padded) <= size:  # this was the whole token; a larger size would repeat it
                break
    return words + pairs, char_ngrams


@lru_cache(maxsize=100_000)
def hash_ngrams(message: str, num_buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return bucket, 1 + ln count and type (0 word, 1 character) of distinct n-grams, all (n)."""
    rows = [
        (bucket, count, ngram_type)
        for ngram_type, grams in enumerate(extract_ngrams(message))
        for bucket, count in Counter(
            zlib.crc32(g.encode(), ngram_type) % num_buckets for g in grams
        ).items()
    ]
    entries = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)  # (n 3), also for n = 0
    bucket, count, ngram_type = entries.unbind(1)
    return bucket, 1 + count.float().log(), ngram_type


def compute_idf(messages: list[str], num_buckets: int) -> Tensor:
    """Inverse document frequency of each bucket (buckets); 0 for a bucket without messages."""
    frequency = torch.zeros(num_buckets)
    for message in messages:
        frequency[hash_ngrams(message, num_buckets)[0].unique()] += 1
    return torch.where(frequency > 0, 1 + ((1 + len(messages)) / (1 + frequency)).log(), 0.0)


class HandcraftedFeatures(nn.Module):
    """Handcrafted features of the lecture: list of b messages -> (b 5)."""

    device_marker: Tensor  # empty; it holds only the device

    def __init__(self) -> None:
        """Create a module without parameters."""
        super().__init__()
        self.register_buffer("device_marker", torch.empty(0), persistent=False)

    def forward(self, messages: list[str]) -> Tensor:
        """Compute the features (b 5)."""
        return torch.tensor(
            [handcrafted_features(m) for m in messages], device=self.device_marker.device
        )


class HashedLinear(nn.Module):
    """Linear layer over tf-idf weights of hashed n-grams: list of b messages -> (b out).

    The input has one column for each bucket, and only a few hundred of them are nonzero. So the
    product is a weighted sum of those rows of `weight` (buckets, out).
    """

    idf: Tensor  # (buckets)

    def __init__(self, idf: Tensor, out_features: int, std: float) -> None:
        """Initialize the weights with the given standard deviation."""
        super().__init__()
        self.register_buffer("idf", idf)
        self.weight = nn.Parameter(torch.empty(len(idf), out_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, messages: list[str]) -> Tensor:
        """Compute tf-idf weights of the n-grams and the weighted sum of rows, (b out).

        The n n-grams of all messages are concatenated. The weights of a message's words have unit
        length, and so have those of its characters. An n-gram is represented by its bucket, a hash
        value; `weight` has a row for each bucket.

        Axes: b messages, n n-grams of all messages, out outputs.
        """
        # bucket, 1 + ln count and type (0 word, 1 character) of the n-grams of each message
        buckets, log_counts, ngram_types = zip(
            *(hash_ngrams(m, len(self.idf)) for m in messages), strict=True
        )
        sizes = torch.tensor([len(b) for b in buckets])  # (b) n-grams of each message
        message_index = torch.arange(len(sizes)).repeat_interleave(sizes)  # (n)
        segment = 2 * message_index + torch.cat(ngram_types)  # (n) one of 2b: message and type
        offsets = sizes.cumsum(0) - sizes  # (b) of a message's first n-gram
        bucket, log_count, segment, offsets = (
            x.to(self.idf.device)
            for x in (torch.cat(buckets), torch.cat(log_counts), segment, offsets)
        )
        weight = log_count * self.idf[bucket]  # (n)
        squared_norm = weight.new_zeros(2 * len(messages)).index_add(0, segment, weight.square())
        # clamp: no division by 0, even if all idf are 0
        weight = weight / squared_norm.clamp(min=1e-12).sqrt()[segment]
        weighted_sum = F.embedding_bag(
            bucket, self.weight, offsets, mode="sum", per_sample_weights=weight
        )
        return weighted_sum + self.bias


class SpamClassifier(TaskModule):
    """Spam classifier; batches are {"message": list of b, "label": (b)}.

        Trainer(max_epochs=10).fit(SpamClassifier(), datamodule=SpamDataModule(source="sms"))

    Args:
        features: the five of the lecture, or hashed n-grams.
        hidden_size: units of an MLP's hidden layer; 0 is logistic regression.
        num_buckets: number of hash buckets of the n-grams; 2^18 suits 10^5 different ones.
    """

    lr = 1e-2
    prediction_columns = (
        "line",
        "message",
        "probability",
        "label",
    )  # columns of predict_step's rows

    def __init__(
        self,
        features: Literal["handcrafted", "ngrams"] = "ngrams",
        hidden_size: int = 0,
        num_buckets: int = 2**18,
    ) -> None:
        """Store the options and create the metrics; raise UsageError for a size out of range.

        The net is built later, by `build_net`, when the data have set `idf`.
        """
        super().__init__()
        if hidden_size < 0 or num_buckets < 1:
            raise UsageError(
                f"SpamClassifier: hidden_size={hidden_size} and num_buckets={num_buckets} are not "
                "both valid",
                ["hidden_size: 0 or more", "num_buckets: 1 or more"],
                "use hidden_size=0, num_buckets=262144",
                flag="--model.hidden_size=0 --model.num_buckets=262144",
            )
        self.save_hyperparameters()
        self.features, self.hidden_size, self.num_buckets = features, hidden_size, num_buckets
        self.idf = torch.zeros(0)  # inverse document frequencies of the training messages
        # of torchmetrics: they accumulate over the batches of an evaluation, and over ranks
        self.val_loss, self.val_accuracy = MeanMetric(), BinaryAccuracy()
        self.test_metrics = MetricCollection(
            {"accuracy": BinaryAccuracy(), "f1": BinaryF1Score(), "auroc": BinaryAUROC()},
            prefix="test/",
        )
        self.confusion_matrix = BinaryConfusionMatrix()

    def configure_from_data(self, datamodule: Any) -> None:
        """Compute the idf of the training messages; a trained net has its own idf."""
        if self.features == "ngrams" and self.net is None:
            self.idf = compute_idf(datamodule.train_messages, self.num_buckets)

    def build_net(self) -> nn.Module:
        """Create a linear layer from features to a logit, or an MLP with one hidden layer."""
        out_features = self.hidden_size or 1
        if self.features == "ngrams":
            idf = (
                self.idf if len(self.idf) else torch.zeros(self.num_buckets)
            )  # loaded from a checkpoint
            layers = [HashedLinear(idf, out_features, std=0.5 if self.hidden_size else 0.0)]
        else:
            layers = [HandcraftedFeatures(), nn.Linear(5, out_features)]
        if self.hidden_size:
            layers += [nn.ReLU(), nn.Linear(self.hidden_size, 1)]
        return nn.Sequential(*layers)

    def compute_loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy, and the probability of spam (b)."""
        logits = self(batch["message"])[:, 0].float()  # (b)
        return F.binary_cross_entropy_with_logits(logits, batch["label"].float()), logits.sigmoid()

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        """Mean cross-entropy."""
        loss, _ = self.compute_loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        """Log loss and accuracy."""
        loss, probability = self.compute_loss(batch)
        self.val_loss(loss, len(batch["label"]))
        self.val_accuracy(probability, batch["label"])
        self.log("val/loss", self.val_loss)
        self.log("val/accuracy", self.val_accuracy)

    def test_step(self, batch: dict[str, Any], index: int) -> None:
        """Update accuracy, F1 of spam, AUROC and the confusion matrix."""
        _, probability = self.compute_loss(batch)
        self.test_metrics.update(probability, batch["label"])
        self.confusion_matrix.update(probability, batch["label"])

    def on_test_epoch_end(self) -> None:
        """Log the metrics, NaN where undefined, and the named entries of the confusion matrix."""
        matrix = self.confusion_matrix.compute().float()  # (2 2) over all ranks: true, predicted
        num_ham, num_spam = matrix.sum(1).tolist()
        has_predicted_spam = matrix[:, 1].any()
        is_undefined = {
            "auroc": not num_ham or not num_spam,  # needs both classes
            "f1": not num_spam and not has_predicted_spam,  # 0 / 0
        }
        nan = torch.full_like(matrix[0, 0], float("nan"))
        for name, metric in self.test_metrics.items(keep_base=True):  # names without "test/"
            self.log(f"test/{name}", nan if is_undefined.get(name) else metric.compute())
        if any(is_undefined.values()):
            names = " and ".join(f"test/{name}" for name, flag in is_undefined.items() if flag)
            missing_label = LABELS[0] if not num_ham else LABELS[1]
            rank_zero_info(
                f"{names}: undefined, so NaN: no {missing_label} among the "
                f"{num_ham + num_spam:.0f} test messages"
            )
        # true and false negatives and positives; spam is the positive class
        for name, count in zip(CONFUSION_NAMES, matrix.flatten(), strict=True):
            self.log(f"test/{name}", count)
        self.confusion_matrix.reset()
        self.test_metrics.reset()

    def predict_step(self, batch: dict[str, Any], index: int) -> list[tuple[int, str, float, str]]:
        """Return (line number from 1, message, probability of spam, label) for each message."""
        probabilities = self(batch["message"])[:, 0].float().sigmoid().tolist()
        indices = batch["index"].tolist() if "index" in batch else range(len(probabilities))
        rows = zip(indices, batch["message"], probabilities, strict=True)
        return [
            (index_in_file + 1, message, p, LABELS[p > 0.5]) for index_in_file, message, p in rows
        ]
