"""Language model: next-token prediction with a transformer, and text generation (lecture 5).

The loss is cross-entropy in nats per token. Loss and perplexity depend on the tokenizer. Bits per
byte do not, so they compare models with different vocabularies.

Axes: b batch, t time, v vocabulary.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ravine.datamodules.text import IGNORE_INDEX
from ravine.datamodules.tokenizer_factory import tokenizer_from_state_dict
from ravine.datamodules.tokenizers import Tokenizer
from ravine.errors import UsageError, check_at_least_one, format_arguments, format_flags

from . import model_stats
from .generation.decoding import ContextOverflow, check_prompt_lengths
from .generation.generate_text import generate_text
from .generation.sampling import DecodingConfig
from .nn import Transformer
from .nn.cross_entropy import cross_entropy
from .nn.moe import mean_load_balancing_loss
from .nn.transformer import LARGE_VOCAB, with_defaults
from .plots import language
from .pretrained import gpt2
from .task_module import TaskModule

# arguments of Transformer that change the computation but not the shapes of the tensors
NON_SHAPE_ARGUMENTS = (
    "num_heads",
    "qk_norm",
    "activation",
    "norm_eps",
    "rope_base",
    "attention_variant",
    "residual",
    "positional_encoding",
)
LOAD_BALANCING_COEF = 0.01  # coefficient of the load balancing loss (Switch, 2021)


class LanguageModel(TaskModule):
    """Transformer language model; batches are (inputs, targets) of token ids, both (b t).

        model = LanguageModel(num_layers=2, d_model=64)
        Trainer(max_steps=500).fit(model, datamodule=TextDataModule("my.txt"))
        print(model.generate("Once"))

    Args:
        vocab_size: number of different tokens; by default that of the data.
        context_length: maximum number of tokens that the net sees; by default that of the data.
        net_kwargs: the other arguments of `Transformer`.
    """

    unit = "tokens"
    _datamodule_name, _data_flag = "TextDataModule", "--data.path=FILE"

    def __init__(
        self, vocab_size: int | None = None, context_length: int | None = None, **net_kwargs: Any
    ) -> None:
        """Store the arguments and check them by building a net on the meta device.

        The net of the model is built later, by `build_net`, when the data have set the sizes that
        are None here.
        """
        super().__init__()
        self.save_hyperparameters()
        self.vocab_size, self.context_length = vocab_size, context_length
        self.net_kwargs = net_kwargs  # further arguments of Transformer
        self.tokenizer: Tokenizer | None = None
        # Whether a checkpoint's tokenizer of the same size may differ from that of the data, which
        # is kept. ExactResume sets it for a resume that accepts changed data.
        self.accepts_tokenizer = False
        self.eval_sums = torch.zeros(3)  # of an evaluation: loss in nats, tokens, bytes
        # a tensor on the meta device has a shape but no values
        with torch.device("meta"):  # runs the checks without memory; 1 stands for an unknown size
            Transformer(
                1 if vocab_size is None else vocab_size,
                1 if context_length is None else context_length,
                **net_kwargs,
            )

    def build_net(self) -> Transformer:
        """Create the transformer."""
        return Transformer(*self._require_sizes(), **self.net_kwargs)

    def configure_from_data(self, datamodule: Any) -> None:
        """Set tokenizer, vocabulary and context from the data; raise UsageError for other sizes."""
        self._set_tokenizer(datamodule.tokenizer, "the datamodule")
        if self.context_length is None:
            self.context_length = datamodule.context_length
        elif self.context_length < datamodule.context_length:
            raise UsageError(
                f"LanguageModel: context_length={self.context_length} is shorter than the windows "
                f"of the datamodule, {datamodule.context_length} tokens",
                [f"windows of {self.context_length} tokens or fewer"],
                f"use {self._datamodule_name}(context_length={self.context_length})",
                flag=f"--data.context_length={self.context_length}",
            )

    def param_formula(self) -> str:
        """Formula of the number of parameters in the lecture's notation: 2|V|d + 11Ld² + 5Ld."""
        return " + ".join(model_stats.count_parameters(*self._require_sizes(), **self.net_kwargs))

    def flops_per_unit(self) -> int:
        """FLOPs of a training step for each token."""
        return model_stats.count_training_flops(*self._require_sizes(), **self.net_kwargs)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Mean cross-entropy of (inputs, targets), both (b t)."""
        # under context parallelism a rank may have no target with a loss: 0 instead of 0/0
        loss = self._loss_sum(*batch) / self.num_loss_terms(batch).clamp(min=1)
        self.log("train/loss", loss)
        return (
            loss + LOAD_BALANCING_COEF * mean_load_balancing_loss(self)
            if self.net_kwargs.get("num_experts")
            else loss
        )

    def num_loss_terms(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Number of tokens in the loss of (inputs, targets); the loss is the mean over them."""
        return (batch[1] != IGNORE_INDEX).sum()

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        # float64: many small terms, and the order of addition depends on ranks
        self.eval_sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Add up loss, tokens and bytes, so that all tokens have equal weight in the mean."""
        inputs, targets = batch
        is_counted = targets != IGNORE_INDEX
        total = self._loss_sum(inputs, targets)
        num_bytes = self._get_token_bytes(targets.device)[targets.clamp(min=0)]  # (b t)
        self.eval_sums += torch.stack((total, is_counted.sum(), (num_bytes * is_counted).sum()))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole split."""
        self._log_eval_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Reset the sums."""
        self.on_validation_epoch_start()

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Add up loss, tokens and bytes as in validation."""
        self.validation_step(batch, index)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole split."""
        self._log_eval_metrics("test")

    def count_units(self, batch: tuple[Tensor, Tensor]) -> int:
        """Number of tokens in a batch."""
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
        context_overflow: ContextOverflow = "slide",
        batch_size: int = 64,
        on_text: Callable[[str], None] | None = None,
    ) -> str | list[str]:
        """Generate text after one prompt or each of several; equal seeds give equal texts.

            model.generate("ROMEO:", temperature=0.5, stop="\\n\\n")

        Args:
            prompt: beginning of the text; by default `default_prompt`.
            max_new_tokens: maximum number of tokens to generate.
            temperature: values below 1 favor probable tokens; 0 takes the most probable token.
            top_k: sample only from the k most probable tokens.
            top_p: sample only from the most probable tokens with this total probability.
            min_p: exclude tokens less than this times as probable as the most probable token.
            num_samples: number of texts for each prompt.
            stop: stop string or strings; the text ends before the first one.
            seed: random seed; each text depends on the seed and its index.
            context_overflow: if the model's context is full, "slide" drops the older half, "error"
                raises.
            batch_size: number of texts generated at once.
            on_text: called with each new piece of the text; not used for several texts.
        """
        if self.net is None or self.tokenizer is None or self.context_length is None:
            raise UsageError(
                f"{type(self).__name__}: generate needs a net and a tokenizer, but this model is "
                "not trained yet",
                ["a model after trainer.fit", "a model from load_from_checkpoint"],
                f"train the model on a {self._datamodule_name}, or load a checkpoint",
            )
        check_at_least_one(
            "generate", flag_prefix="--", num_samples=num_samples, batch_size=batch_size
        )
        sampling = DecodingConfig(temperature, top_k, top_p, min_p)  # raises if out of range
        # the default prompt is a line break, if the tokenizer has one
        prompt = self.default_prompt if prompt is None else prompt
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_samples)]
        stops = [stop] if isinstance(stop, str) else list(stop)
        texts: list[str] = []
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            completions = generate_text(
                self.net,
                self.tokenizer,
                batch,
                stops,
                on_text=on_text if len(prompts) == 1 else None,
                max_new_tokens=max_new_tokens,
                context_length=self.context_length,
                sampling=sampling,
                seed=seed,
                row_keys=range(first, first + len(batch)),  # a text does not depend on its batch
                context_overflow=context_overflow,
            )
            texts += [
                prompt_text + completion
                for prompt_text, completion in zip(batch, completions, strict=True)
            ]
        return texts[0] if isinstance(prompt, str) and num_samples == 1 else texts

    @property
    def default_prompt(self) -> str:
        """A line break, or the first known character if the tokenizer has no line break."""
        characters = getattr(self.tokenizer, "characters", "\n")
        return "\n" if "\n" in characters else characters[0]

    def try_generate(self, **arguments: Any) -> str | list[str]:
        """Check the arguments of `generate` as for the full length, and generate one token.

        The callback GenerateSamples calls it before training, to reject invalid arguments early.
        `arguments` are some of those of `generate`; the others have their defaults.
        """
        bound = inspect.signature(self.generate).bind(**arguments)
        bound.apply_defaults()
        values = bound.arguments
        if self.tokenizer is not None and self.context_length is not None:
            prompt = values["prompt"]
            prompts = [prompt] if isinstance(prompt, str) else prompt or [self.default_prompt]
            check_prompt_lengths(
                [len(self.tokenizer.encode(p)) for p in prompts],
                values["max_new_tokens"],
                self.context_length,
                values["context_overflow"],
            )
        return self.generate(**arguments | {"max_new_tokens": 1, "on_text": None})

    def make_figures(self, datamodule: Any) -> dict[str, Any]:
        """Create figures: next-token probabilities, attention weights, bigrams (identity)."""
        net, tokenizer = cast(Transformer, self.net), cast(Tokenizer, self.tokenizer)
        corpus_tokens = datamodule.corpus.tokens
        token_names = [tokenizer.decode([n]) for n in range(tokenizer.vocab_size)]
        prefix = corpus_tokens[: min(32, net.context_length)].long().to(self.device)  # (t)
        prompt = tokenizer.decode(prefix[:12])
        figures = {
            "temperatures": language.plot_temperatures(net, prefix[:12], token_names, prompt)
        }
        figures["attention"] = language.plot_attention(net, prefix, token_names)
        if self.net_kwargs.get("attention_variant") == "identity" and tokenizer.vocab_size <= 256:
            figures["bigrams"] = language.plot_bigrams(net, corpus_tokens, token_names)
        return figures

    def load_pretrained(self, path: str) -> None:
        """Load GPT-2 weights from a model.safetensors in Hugging Face's layout."""
        gpt2.load_hf(path, cast(Transformer, self.net))

    def export(self, folder: str, format: Literal["gpt2"] = "gpt2") -> str:
        """Write the net's weights into a folder, in the format of another library.

        Args:
            folder: output folder; files of the same names are replaced.
            format: gpt2 is the format of Hugging Face's transformers.
        """
        net = cast(Transformer, self.net)
        gpt2.save_hf(
            net, self.net_kwargs, folder, self.tokenizer.eos_id if self.tokenizer else None
        )
        return f"{folder}/model.safetensors, config.json"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save tokenizer and context with the weights."""
        super().on_save_checkpoint(checkpoint)
        tokenizer = None if self.tokenizer is None else self.tokenizer.state_dict()
        checkpoint["language"] = {"tokenizer": tokenizer, "context_length": self.context_length}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load tokenizer and context, unless they are already set from the data."""
        super().on_load_checkpoint(checkpoint)
        self._check_same_function(checkpoint.get("hyper_parameters", {}))
        saved = self.saved_data_fields(checkpoint, "language", ("tokenizer", "context_length"))
        if saved["tokenizer"] is not None:
            self._set_tokenizer(tokenizer_from_state_dict(saved["tokenizer"]), "the checkpoint")
        self.context_length = self.context_length or saved["context_length"]

    def _check_same_function(self, saved_hparams: dict[str, Any]) -> None:
        """Raise UsageError if the saved weights fit, but this net would compute other values.

        It compares the arguments of Transformer that do not change the shapes of the weights, such
        as num_heads. `saved_hparams` is empty for a checkpoint without hyperparameters.
        """
        defaults = with_defaults({})  # of all arguments of Transformer
        saved_kwargs = defaults | {k: v for k, v in saved_hparams.items() if k in defaults}
        kwargs = defaults | self.net_kwargs
        mismatches = [key for key in NON_SHAPE_ARGUMENTS if kwargs[key] != saved_kwargs[key]]
        actual = {key: kwargs[key] for key in mismatches}
        expected = {key: saved_kwargs[key] for key in mismatches}
        if saved_hparams and mismatches:
            raise UsageError(
                f"LanguageModel: the model of the checkpoint has {format_arguments(expected)}, "
                f"but this model has {format_arguments(actual)}, and would compute other values "
                "from its weights",
                [format_arguments(expected)],
                f"use LanguageModel({format_arguments(expected)}, ...)",
                flag=format_flags("--model.", expected),
            )

    def _set_tokenizer(self, tokenizer: Tokenizer, origin: str) -> None:
        """Set tokenizer and vocabulary size; raise UsageError if they differ from the model's.

        `origin` is "the datamodule" or "the checkpoint", for the message.
        """
        current = self.tokenizer
        # equivalent: the same text has the same token ids
        is_accepted = (
            self.accepts_tokenizer
            and origin == "the checkpoint"
            and current is not None
            and current.vocab_size == tokenizer.vocab_size
        )
        if current is not None and not is_accepted and not current.is_equivalent(tokenizer):
            raise UsageError(
                f"LanguageModel: the tokenizer of {origin} ({tokenizer.vocab_size} tokens) "
                f"differs from that of the model ({current.vocab_size} tokens), because they come "
                "from different texts",
                ["a tokenizer equal to the model's"],
                "use the text that the model was trained on",
                flag=self._data_flag,
            )
        if self.vocab_size not in (None, tokenizer.vocab_size):
            raise UsageError(
                f"LanguageModel: vocab_size={self.vocab_size} differs from the "
                f"{tokenizer.vocab_size} tokens of the tokenizer of {origin}",
                [tokenizer.vocab_size],
                "remove vocab_size, which comes from the data",
            )
        # equal vocabularies may treat special tokens differently: the data's tokenizer is kept
        self.tokenizer, self.vocab_size = current or tokenizer, tokenizer.vocab_size

    def _loss_sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self._require_sizes()[0] <= LARGE_VOCAB:
            return cross_entropy(self(inputs), targets, "sum")
        return self(inputs, None, targets)  # chunked loss: the logits are too large to return

    def _require_sizes(self) -> tuple[int, int]:
        if self.vocab_size is None or self.context_length is None:
            raise self.missing_data_error("vocab_size and context_length")
        return self.vocab_size, self.context_length

    def _get_token_bytes(self, device: torch.device) -> Tensor:
        if self.tokenizer is None:
            return torch.full((self.vocab_size or 1,), math.nan, device=device)
        return self.tokenizer.token_bytes.to(device)

    def _log_eval_metrics(self, stage: str) -> None:
        total, tokens, num_bytes = self.trainer.strategy.reduce(self.eval_sums, reduce_op="sum")
        loss = total / tokens
        metrics = {"loss": loss, "perplexity": loss.exp()}
        if self.tokenizer is not None and self.tokenizer.has_token_bytes:
            metrics["bits_per_byte"] = total / math.log(2) / num_bytes
        prefixed = {f"{stage}/{name}": value.float() for name, value in metrics.items()}
        self.log_dict(prefixed, sync_dist=True)  # equal on all ranks; avoids Lightning's warning
