"""A language model: predict each token of a text from those before it, then write (lecture 5).

The loss is cross-entropy in nats per token. It depends on the tokenizer, and so does perplexity;
bits per byte do not, and are what models with different vocabularies are compared by.

Axes: b batch, t time, v vocabulary.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ravine.datamodules.tokenizers import Tokenizer, from_state
from ravine.errors import UsageError

from . import model_stats as accounting
from .generation.decoding import Window, check
from .generation.sampling import Sampling
from .generation.stop_strings import write
from .nn import Transformer
from .nn.cross_entropy import IGNORED, nats
from .nn.moe import balance_of
from .nn.transformer import LARGE, complete
from .plots import language as draw
from .pretrained import gpt2
from .task_module import TaskModule

# arguments of Transformer that decide what the same tensors compute
UNSEEN = ("heads", "qk_norm", "mlp", "norm_eps", "rope_base", "rung", "residual", "positions")
BALANCE = 0.01  # of the loss that keeps experts equally busy (Switch, 2021)


class LanguageModel(TaskModule):
    """A transformer over the tokens of any text; batches are (inputs, targets), both (b t).

        model = LanguageModel(layers=2, width=64)
        Trainer(max_steps=500).fit(model, datamodule=TextDataModule("my.txt"))
        print(model.generate("Once"))

    Args:
        vocabulary: number of different tokens; by default the data's.
        context: tokens the net sees at once; by default the data's.
        shape: the other arguments of `Transformer`.
    """

    unit = "tokens"

    def __init__(
        self, vocabulary: int | None = None, context: int | None = None, **shape: Any
    ) -> None:
        """Check the shape before any work is done."""
        super().__init__()
        self.save_hyperparameters()
        self.vocabulary, self.context, self.shape = vocabulary, context, shape
        self.tokenizer: Tokenizer | None = None
        self.sums = torch.zeros(3)  # of an evaluation: nats, tokens, bytes
        with torch.device("meta"):  # nothing is allocated, every check is made
            v, t = (1 if size is None else size for size in (vocabulary, context))
            Transformer(v, t, **shape)

    def build(self) -> Transformer:
        """The transformer."""
        return Transformer(*self._sizes(), **self.shape)

    def adopt(self, datamodule: Any) -> None:
        """Take tokenizer, vocabulary and context from the data; refuse data of other sizes."""
        self._take(datamodule.tokenizer, "the data's")
        if self.context is None:
            self.context = datamodule.context
        elif self.context < datamodule.context:
            raise UsageError(
                f"the data's windows have {datamodule.context} tokens and the model sees "
                f"{self.context}; allowed: {self.context} or less; "
                f"type --data.context={self.context}"
            )

    def formula(self) -> str:
        """The number of parameters as the lecture writes it: 2|V|d + 11Ld² + 5Ld."""
        return " + ".join(accounting.parameters(*self._sizes(), **self.shape))

    def flops(self) -> int:
        """FLOPs of a training step for each token."""
        return accounting.training_flops(*self._sizes(), **self.shape)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Mean loss of (inputs, targets), both (b t)."""
        # a rank that has a part of each sequence may have no answer in it: 0, and not 0/0
        loss = self._nats(*batch) / self.terms(batch).clamp(min=1)
        self.log("train/loss", loss)
        return loss + BALANCE * balance_of(self) if self.shape.get("experts") else loss

    def terms(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Tokens of (inputs, targets) that are learned: over these the loss is a mean."""
        return (batch[1] != IGNORED).sum()

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        # float64: a hundred thousand small terms, and ranks that add in another order
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Add up, so that ragged batches and unequal ranks weigh by their tokens."""
        inputs, targets = batch
        counted = targets != IGNORED
        total = self._nats(inputs, targets)
        size = self._bytes(targets.device)[targets.clamp(min=0)]  # (b t)
        self.sums += torch.stack((total, counted.sum(), (size * counted).sum()))

    def on_validation_epoch_end(self) -> None:
        """Log the loss of the whole split."""
        self._report("val")

    def on_test_epoch_start(self) -> None:
        """As in validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """As in validation."""
        self.validation_step(batch, index)

    def on_test_epoch_end(self) -> None:
        """Log the loss of the whole split."""
        self._report("test")

    def count(self, batch: tuple[Tensor, Tensor]) -> int:
        """Tokens in a batch."""
        return batch[0].numel()

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        num_samples: int = 1,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        window: Window = "slide",
        batch_size: int = 64,
        show: Callable[[str], None] | None = None,
    ) -> str | list[str]:
        """Continue a prompt, or each of a list; the same seed gives the same texts.

        model.generate("ROMEO:", temperature=0.5, stop="\\n\\n")

        Args:
            prompt: the beginning; by default `default_prompt`.
            max_new_tokens: most tokens to write.
            temperature: below 1 the probable becomes more so; 0 takes the most probable token.
            top_k: draw only from the k most probable tokens.
            top_p: draw only from the most probable tokens that together hold this probability.
            min_p: leave out tokens less than this times as probable as the most probable.
            num_samples: texts for each prompt.
            stop: a text before which to stop, or several.
            seed: decides the texts, each by its number.
            window: when the model's context is full, forget the older half, or refuse beforehand.
            batch_size: texts written at once.
            show: called with each new piece of a single text.
        """
        if self.net is None or self.tokenizer is None or self.context is None:
            raise UsageError(
                "LanguageModel has no tokenizer to write with; "
                "train it on a TextDataModule, or load a checkpoint of one that was"
            )
        if num_samples < 1 or batch_size < 1:
            raise UsageError("num_samples and batch_size must be 1 or more; type --num_samples=1")
        sampling = Sampling(temperature, top_k, top_p, min_p)
        prompt = self.default_prompt if prompt is None else prompt
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_samples)]
        stops = [stop] if isinstance(stop, str) else list(stop)
        how = {"new": max_new_tokens, "context": self.context, "sampling": sampling, "seed": seed}
        texts: list[str] = []
        for first in range(0, len(prompts), batch_size):
            part = prompts[first : first + batch_size]
            numbers = range(first, first + len(part))
            how |= {"window": window, "texts": numbers, "show": show if len(prompts) == 1 else None}
            new = write(self.net, self.tokenizer, part, stops, **how)
            texts += [before + after for before, after in zip(part, new, strict=True)]
        return texts[0] if isinstance(prompt, str) and num_samples == 1 else texts

    @property
    def default_prompt(self) -> str:
        """A line break; the first known character for a text that has none."""
        known = getattr(self.tokenizer, "characters", "\n")
        return "\n" if "\n" in known else known[0]

    def try_generate(self, **arguments: Any) -> str | list[str]:
        """One token for these arguments of `generate`, all of which are checked as for many."""
        given = inspect.signature(self.generate).bind(**arguments)
        given.apply_defaults()
        new, window = given.arguments["max_new_tokens"], given.arguments["window"]
        if self.tokenizer is not None and self.context is not None:
            prompt = given.arguments["prompt"]
            prompts = [prompt] if isinstance(prompt, str) else prompt or [self.default_prompt]
            check([len(self.tokenizer.encode(p)) for p in prompts], new, self.context, window)
        return self.generate(**arguments | {"max_new_tokens": 1, "show": None})

    def figures(self, datamodule: Any) -> dict[str, Any]:
        """Next-token probabilities and attention on the data's text, and bigrams if it has them."""
        net, tokenizer = cast(Transformer, self.net), cast(Tokenizer, self.tokenizer)
        text = datamodule.corpus.tokens
        names = [tokenizer.decode([n]) for n in range(tokenizer.vocabulary)]
        begun = text[: min(32, net.context)].long().to(self.device)  # (t)
        prompt = tokenizer.decode(begun[:12])
        drawn = {"temperatures": draw.temperatures(net, begun[:12], names, prompt)}
        drawn["attention"] = draw.attention(net, begun, names)
        if self.shape.get("rung") == "last" and tokenizer.vocabulary <= 256:
            drawn["bigrams"] = draw.bigrams(net, text, names)
        return drawn

    def load_pretrained(self, path: str) -> None:
        """Take over GPT-2's weights from model.safetensors in Hugging Face's layout."""
        gpt2.read(path, cast(Transformer, self.net))

    def export(self, folder: str, format: Literal["gpt2"] = "gpt2") -> str:
        """Write the net's weights for other programs into a folder.

        Args:
            folder: where; files of the same names are replaced.
            format: gpt2 is what Hugging Face's transformers read.
        """
        net = cast(Transformer, self.net)
        gpt2.write(net, self.shape, folder, self.tokenizer.end if self.tokenizer else None)
        return f"{folder}/model.safetensors, config.json"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The tokenizer and the sizes travel with the weights."""
        super().on_save_checkpoint(checkpoint)
        tokenizer = None if self.tokenizer is None else self.tokenizer.state()
        checkpoint["language"] = {"tokenizer": tokenizer, "context": self.context}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them from a checkpoint, unless the data brought others."""
        super().on_load_checkpoint(checkpoint)
        self._refuse_other_function(checkpoint.get("hyper_parameters", {}))
        saved = checkpoint.get("language")
        if not isinstance(saved, dict) or not {"tokenizer", "context"} <= saved.keys():
            raise UsageError(
                "the checkpoint has no tokenizer and no context of a language model; choose one "
                "that `fit` has written"
            )
        if saved["tokenizer"] is not None:
            self._take(from_state(saved["tokenizer"]), "the checkpoint's")
        self.context = self.context or saved["context"]

    def _refuse_other_function(self, saved: dict[str, Any]) -> None:
        """Refuse weights that fit, and that this net would compute something else with."""
        known = complete({})
        theirs = known | {key: value for key, value in saved.items() if key in known}
        ours = known | self.shape
        other = [key for key in UNSEEN if ours[key] != theirs[key]]
        if saved and other:
            raise UsageError(
                "the checkpoint's model has "
                f"{', '.join(f'{key}={theirs[key]}' for key in other)}, and this one "
                f"{', '.join(f'{key}={ours[key]}' for key in other)}; its weights would compute "
                f"something else; type {' '.join(f'--model.{key}={theirs[key]}' for key in other)}"
            )

    def _take(self, tokenizer: Tokenizer, whose: str) -> None:
        ours = self.tokenizer
        if ours is not None and not ours.alike(tokenizer):
            raise UsageError(
                f"{whose} tokenizer has {tokenizer.vocabulary} tokens, the model's other "
                f"{ours.vocabulary}: they come from different texts; "
                "type --data.path=... with the text the model was trained on"
            )
        if self.vocabulary not in (None, tokenizer.vocabulary):
            raise UsageError(
                f"{whose} tokenizer has {tokenizer.vocabulary} tokens, the model "
                f"{self.vocabulary}; leave --model.vocabulary away: it comes from the data"
            )
        # equal vocabularies may treat special tokens differently: that of the data is kept
        self.tokenizer, self.vocabulary = ours or tokenizer, tokenizer.vocabulary

    def _nats(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self._sizes()[0] <= LARGE:
            return nats(self(inputs), targets, "sum")
        return self(inputs, None, targets)  # the net, since its logits are too many to hand over

    def _sizes(self) -> tuple[int, int]:
        if self.vocabulary is None or self.context is None:
            raise UsageError(
                "LanguageModel takes its vocabulary and context from the data, and there are "
                "none; type --data=TextDataModule, or give both as arguments"
            )
        return self.vocabulary, self.context

    def _bytes(self, device: torch.device) -> Tensor:
        if self.tokenizer is None:
            return torch.full((self.vocabulary or 1,), math.nan, device=device)
        return self.tokenizer.token_bytes.to(device)

    def _report(self, stage: str) -> None:
        total, tokens, size = self.trainer.strategy.reduce(self.sums, reduce_op="sum")
        loss = total / tokens
        metrics = {"loss": loss, "perplexity": loss.exp()}
        if self.tokenizer is not None and self.tokenizer.sized:
            metrics["bits_per_byte"] = total / math.log(2) / size
        found = {f"{stage}/{name}": value.float() for name, value in metrics.items()}
        self.log_dict(found, sync_dist=True)  # alike on all ranks; or Lightning would advise it
