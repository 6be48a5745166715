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

from ravine.datamodules.tokenizers import Tokenizer, tokenizer_from_state_dict
from ravine.errors import UsageError

from . import model_stats as accounting
from .generation.decoding import Window, check_prompt_lengths
from .generation.sampling import Sampling
from .generation.stop_strings import generate_text
from .nn import Transformer
from .nn.cross_entropy import IGNORE_INDEX, cross_entropy
from .nn.moe import mean_load_balancing_loss
from .nn.transformer import LARGE_VOCAB, with_defaults
from .plots import language as draw
from .pretrained import gpt2
from .task_module import TaskModule

# arguments of Transformer that decide what the same tensors compute
NON_SHAPE_ARGUMENTS = (
    "heads",
    "qk_norm",
    "mlp",
    "norm_eps",
    "rope_base",
    "rung",
    "residual",
    "positions",
)
LOAD_BALANCING_COEF = 0.01  # of the loss that keeps experts equally busy (Switch, 2021)


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
        self, vocabulary: int | None = None, context: int | None = None, **net_kwargs: Any
    ) -> None:
        """Check the shape before any work is done."""
        super().__init__()
        self.save_hyperparameters()
        self.vocabulary, self.context, self.shape = vocabulary, context, net_kwargs
        self.tokenizer: Tokenizer | None = None
        self.eval_sums = torch.zeros(3)  # of an evaluation: nats, tokens, bytes
        with torch.device("meta"):  # nothing is allocated, every check is made
            v, t = (1 if size is None else size for size in (vocabulary, context))
            Transformer(v, t, **net_kwargs)

    def build(self) -> Transformer:
        """The transformer."""
        return Transformer(*self._require_sizes(), **self.shape)

    def adopt(self, datamodule: Any) -> None:
        """Take tokenizer, vocabulary and context from the data; refuse data of other sizes."""
        self._set_tokenizer(datamodule.tokenizer, "the data's")
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
        return " + ".join(accounting.parameters(*self._require_sizes(), **self.shape))

    def flops(self) -> int:
        """FLOPs of a training step for each token."""
        return accounting.count_training_flops(*self._require_sizes(), **self.shape)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Mean loss of (inputs, targets), both (b t)."""
        # a rank that has a part of each sequence may have no answer in it: 0, and not 0/0
        loss = self._loss_sum(*batch) / self.terms(batch).clamp(min=1)
        self.log("train/loss", loss)
        return (
            loss + LOAD_BALANCING_COEF * mean_load_balancing_loss(self)
            if self.shape.get("experts")
            else loss
        )

    def terms(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Tokens of (inputs, targets) that are learned: over these the loss is a mean."""
        return (batch[1] != IGNORE_INDEX).sum()

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        # float64: a hundred thousand small terms, and ranks that add in another order
        self.eval_sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Add up, so that ragged batches and unequal ranks weigh by their tokens."""
        inputs, targets = batch
        is_counted = targets != IGNORE_INDEX
        total = self._loss_sum(inputs, targets)
        num_bytes = self._get_token_bytes(targets.device)[targets.clamp(min=0)]  # (b t)
        self.eval_sums += torch.stack((total, is_counted.sum(), (num_bytes * is_counted).sum()))

    def on_validation_epoch_end(self) -> None:
        """Log the loss of the whole split."""
        self._log_eval_metrics("val")

    def on_test_epoch_start(self) -> None:
        """As in validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """As in validation."""
        self.validation_step(batch, index)

    def on_test_epoch_end(self) -> None:
        """Log the loss of the whole split."""
        self._log_eval_metrics("test")

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
        kwargs = {
            "max_new_tokens": max_new_tokens,
            "context_length": self.context,
            "sampling": sampling,
            "seed": seed,
        }
        texts: list[str] = []
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            row_keys = range(first, first + len(batch))
            kwargs |= {
                "context_overflow": window,
                "row_keys": row_keys,
                "on_text": show if len(prompts) == 1 else None,
            }
            completions = generate_text(self.net, self.tokenizer, batch, stops, **kwargs)
            texts += [
                prompt_text + completion
                for prompt_text, completion in zip(batch, completions, strict=True)
            ]
        return texts[0] if isinstance(prompt, str) and num_samples == 1 else texts

    @property
    def default_prompt(self) -> str:
        """A line break; the first known character for a text that has none."""
        characters = getattr(self.tokenizer, "characters", "\n")
        return "\n" if "\n" in characters else characters[0]

    def try_generate(self, **arguments: Any) -> str | list[str]:
        """One token for these arguments of `generate`, all of which are checked as for many."""
        bound = inspect.signature(self.generate).bind(**arguments)
        bound.apply_defaults()
        max_new_tokens, context_overflow = (
            bound.arguments["max_new_tokens"],
            bound.arguments["window"],
        )
        if self.tokenizer is not None and self.context is not None:
            prompt = bound.arguments["prompt"]
            prompts = [prompt] if isinstance(prompt, str) else prompt or [self.default_prompt]
            check_prompt_lengths(
                [len(self.tokenizer.encode(p)) for p in prompts],
                max_new_tokens,
                self.context,
                context_overflow,
            )
        return self.generate(**arguments | {"max_new_tokens": 1, "show": None})

    def figures(self, datamodule: Any) -> dict[str, Any]:
        """Next-token probabilities and attention on the data's text, and bigrams if it has them."""
        net, tokenizer = cast(Transformer, self.net), cast(Tokenizer, self.tokenizer)
        corpus_tokens = datamodule.corpus.tokens
        token_names = [tokenizer.decode([n]) for n in range(tokenizer.vocabulary)]
        prefix = corpus_tokens[: min(32, net.context)].long().to(self.device)  # (t)
        prompt = tokenizer.decode(prefix[:12])
        figures = {"temperatures": draw.plot_temperatures(net, prefix[:12], token_names, prompt)}
        figures["attention"] = draw.plot_attention(net, prefix, token_names)
        if self.shape.get("rung") == "last" and tokenizer.vocabulary <= 256:
            figures["bigrams"] = draw.plot_bigrams(net, corpus_tokens, token_names)
        return figures

    def load_pretrained(self, path: str) -> None:
        """Take over GPT-2's weights from model.safetensors in Hugging Face's layout."""
        gpt2.load_hf(path, cast(Transformer, self.net))

    def export(self, folder: str, format: Literal["gpt2"] = "gpt2") -> str:
        """Write the net's weights for other programs into a folder.

        Args:
            folder: where; files of the same names are replaced.
            format: gpt2 is what Hugging Face's transformers read.
        """
        net = cast(Transformer, self.net)
        gpt2.save_hf(net, self.shape, folder, self.tokenizer.eos_id if self.tokenizer else None)
        return f"{folder}/model.safetensors, config.json"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The tokenizer and the sizes travel with the weights."""
        super().on_save_checkpoint(checkpoint)
        tokenizer = None if self.tokenizer is None else self.tokenizer.state()
        checkpoint["language"] = {"tokenizer": tokenizer, "context": self.context}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them from a checkpoint, unless the data brought others."""
        super().on_load_checkpoint(checkpoint)
        self._check_same_function(checkpoint.get("hyper_parameters", {}))
        saved = checkpoint.get("language")
        if not isinstance(saved, dict) or not {"tokenizer", "context"} <= saved.keys():
            raise UsageError(
                "the checkpoint has no tokenizer and no context of a language model; choose one "
                "that `fit` has written"
            )
        if saved["tokenizer"] is not None:
            self._set_tokenizer(tokenizer_from_state_dict(saved["tokenizer"]), "the checkpoint's")
        self.context = self.context or saved["context"]

    def _check_same_function(self, saved: dict[str, Any]) -> None:
        """Refuse weights that fit, and that this net would compute something else with."""
        defaults = with_defaults({})
        saved_kwargs = defaults | {key: value for key, value in saved.items() if key in defaults}
        kwargs = defaults | self.shape
        mismatches = [key for key in NON_SHAPE_ARGUMENTS if kwargs[key] != saved_kwargs[key]]
        if saved and mismatches:
            raise UsageError(
                "the checkpoint's model has "
                f"{', '.join(f'{key}={saved_kwargs[key]}' for key in mismatches)}, and this one "
                f"{', '.join(f'{key}={kwargs[key]}' for key in mismatches)}; its weights would "
                "compute "
                "something else; type "
                f"{' '.join(f'--model.{key}={saved_kwargs[key]}' for key in mismatches)}"
            )

    def _set_tokenizer(self, tokenizer: Tokenizer, whose: str) -> None:
        current = self.tokenizer
        if current is not None and not current.is_equivalent(tokenizer):
            raise UsageError(
                f"{whose} tokenizer has {tokenizer.vocabulary} tokens, the model's other "
                f"{current.vocabulary}: they come from different texts; "
                "type --data.path=... with the text the model was trained on"
            )
        if self.vocabulary not in (None, tokenizer.vocabulary):
            raise UsageError(
                f"{whose} tokenizer has {tokenizer.vocabulary} tokens, the model "
                f"{self.vocabulary}; leave --model.vocabulary away: it comes from the data"
            )
        # equal vocabularies may treat special tokens differently: that of the data is kept
        self.tokenizer, self.vocabulary = current or tokenizer, tokenizer.vocabulary

    def _loss_sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self._require_sizes()[0] <= LARGE_VOCAB:
            return cross_entropy(self(inputs), targets, "sum")
        return self(inputs, None, targets)  # the net, since its logits are too many to hand over

    def _require_sizes(self) -> tuple[int, int]:
        if self.vocabulary is None or self.context is None:
            raise UsageError(
                "LanguageModel takes its vocabulary and context from the data, and there are "
                "none; type --data=TextDataModule, or give both as arguments"
            )
        return self.vocabulary, self.context

    def _get_token_bytes(self, device: torch.device) -> Tensor:
        if self.tokenizer is None:
            return torch.full((self.vocabulary or 1,), math.nan, device=device)
        return self.tokenizer.token_bytes.to(device)

    def _log_eval_metrics(self, stage: str) -> None:
        total, tokens, num_bytes = self.trainer.strategy.reduce(self.eval_sums, reduce_op="sum")
        loss = total / tokens
        metrics = {"loss": loss, "perplexity": loss.exp()}
        if self.tokenizer is not None and self.tokenizer.has_token_bytes:
            metrics["bits_per_byte"] = total / math.log(2) / num_bytes
        prefixed = {f"{stage}/{name}": value.float() for name, value in metrics.items()}
        self.log_dict(prefixed, sync_dist=True)  # alike on all ranks; or Lightning would advise it
