"""REINFORCE: fine-tune a language model on its own samples by policy gradient (lecture 7).

    prompts -> texts -> rewards -> advantages    before the step, in `on_after_batch_transfer`
    loss = - mean_i w_i log p(text_i)            the step: a pure function of tensors

So clipping, optimizers, accumulation and strategies see an ordinary training step. The samples of a
prompt depend on (seed, epoch, sample) only; a step keeps no state for the next one.

Axes: b samples of this rank, B of all ranks, n new tokens, v vocabulary.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ravine.datamodules.loaders import DataParallelInfo
from ravine.datamodules.prompts import PromptBatch
from ravine.datamodules.samplers import resolve_seed
from ravine.datamodules.tokenizer_factory import tokenizer_from_state_dict
from ravine.datamodules.tokenizers import Tokenizer
from ravine.errors import UsageError, UsageTypeError

from .generation.cuda_graphs import capture_cuda_graph
from .generation.generate_text import (
    SYNC_EVERY,
    GenerationOutput,
    generate,
    pad_sequences_for_scoring,
)
from .generation.sampling import DecodingConfig
from .generation.shared_prefix import SharedPrefixBatch
from .language_model import LanguageModel
from .nn import Transformer
from .rl import base_model
from .rl.advantages import AdvantageEstimator
from .rl.kl import KL
from .rl.metrics import Stopwatch
from .rl.rewards.base import CorpusStats, Reward, check_rewards
from .rl.rollout import (
    Rollout,
    compute_ref_logprobs,
    compute_rollout_logprobs,
    disable_adapters,
    logprob_gap,
    make_shared_prefix_batch,
    policy_loss,
)
from .rl.scoring import RolloutScorer
from .rl.validation import check_prompt_characters, check_prompt_length, validate_config
from .task_module import TaskModule


class Reinforce(TaskModule):
    """Language model trained by policy gradient; batches are `PromptBatch`.

        model = Reinforce("runs/reinforce/base", rewards=[CharacterFraction("eE", weight=-1)])
        Trainer(max_steps=75).fit(model, datamodule=PromptDataModule(prompt_length=256))

    Args:
        base_checkpoint: checkpoint of the base language model, or its run's folder.
        rewards: reward terms; the reward is their weighted sum.
        max_new_tokens: maximum number of tokens to generate after a prompt.
        group_size: number of texts for each prompt; a group is on one rank.
        sampling: sampling settings, used to generate and to score tokens.
        estimator: computes advantages and the loss.
        kl: KL penalty to the reference.
        reference: frozen_copy keeps the base model beside the policy; lora is the policy with
            disabled adapters, at no cost in memory; none saves a forward pass and logs no KL.
        stop: stop string of a generated text; its tokens are part of the loss.
    """

    unit, progress_metrics = "tokens", ("train/reward", "train/kl")
    _datamodule_name = "PromptDataModule"
    lr = 1e-4
    unsupported_parallelism = ("cp", "pp")  # unsupported: they split a batch before its texts exist

    def __init__(
        self,
        base_checkpoint: str,  # of the language model, or its run's folder
        rewards: Sequence[Reward] | Reward = (),  # the reward is their weighted sum
        max_new_tokens: int = 256,
        group_size: int = 1,  # texts for each prompt
        # temperature 0.8
        sampling: DecodingConfig = DecodingConfig(0.8),  # noqa: B008 - immutable, as the next ones
        estimator: AdvantageEstimator = AdvantageEstimator(),  # noqa: B008
        kl: KL = KL(),  # noqa: B008
        reference: Literal["frozen_copy", "lora", "none"] = "frozen_copy",
        stop: str | None = None,  # stop string of a generated text
    ) -> None:
        """Store the arguments, and check those that can be checked without data.

        The base model is loaded in `setup`, and its net is built in `configure_model`.
        """
        super().__init__()
        # plain values only, which a checkpoint can hold without pickled classes; the others are
        # objects, and a loaded policy has their defaults
        self.save_hyperparameters(
            "base_checkpoint", "max_new_tokens", "group_size", "reference", "stop"
        )
        self.base_checkpoint = base_checkpoint
        self.max_new_tokens, self.group_size = max_new_tokens, group_size
        self.rewards = [rewards] if isinstance(rewards, Reward) else list(rewards)
        self.sampling, self.estimator, self.kl = sampling, estimator, kl
        self.reference, self.stop = reference, stop
        # from the base model
        self.vocab_size: int | None = None
        self.context_length: int | None = None
        self.net_kwargs: dict[str, Any] = {}
        self.tokenizer: Tokenizer | None = None
        self._base_model: base_model.BaseModel | None = None
        self._base_fingerprint: str | None = None  # checksum of the base model's weights
        # a tuple hides the net from nn.Module: no optimizer, no checkpoint, no sharding
        self._reference_nets: tuple[nn.Module, ...] = ()
        self.corpus_stats: CorpusStats | None = None  # words and speakers of the data, for rewards
        # of the last rollout; the training step logs them. The stopwatch has the seconds of each
        # phase of a step: rollout, reference, reward and update
        self._stopwatch, self._rollout_metrics = Stopwatch(), dict[str, float]()
        self._last_samples: list[dict[str, Any]] = []
        # raises UsageError for a value out of range, or values that exclude each other
        validate_config(max_new_tokens, group_size, sampling, kl, reference, stop)

    def setup(self, stage: str) -> None:
        """Load the base model, then configure the task from the data."""
        # both hooks are intended: the datamodule yields prompts, this module makes a Rollout
        warnings.filterwarnings("ignore", "You have overridden `on_after_batch_transfer`")
        if self._base_model is None and self.net is None:
            self._base_model = base_model_data = base_model.load_base_model(self.base_checkpoint)
            self.vocab_size, self.context_length = (
                base_model_data.vocab_size,
                base_model_data.context_length,
            )
            self.net_kwargs, self.tokenizer = base_model_data.net_kwargs, base_model_data.tokenizer
            self._base_fingerprint = base_model_data.fingerprint
        super().setup(stage)
        check_rewards(self.rewards, self.corpus_stats is not None, self.reference != "none")
        self._stop_sequences()  # raises if the tokenizer cannot encode the stop string

    def configure_from_data(self, datamodule: Any) -> None:
        """Read the corpus, and check prompts and batch size, before the net is built.

        Raises:
            UsageError: there are no prompts, a prompt is too long or has unknown characters, or a
                batch is too small for the baseline.
        """
        if not hasattr(datamodule, "prompts"):
            raise UsageError(
                f"Reinforce needs prompts, but {type(datamodule).__name__} has none",
                [self._datamodule_name],
                "pass datamodule=PromptDataModule(...) to trainer.fit",
                flag="--data=PromptDataModule",
            )
        # the text of a corpus file, or None; some rewards compare generated texts with it
        corpus_text = datamodule.corpus_text
        self.corpus_stats = None if corpus_text is None else CorpusStats(corpus_text)
        accumulate = DataParallelInfo.from_trainer(self.trainer).accumulate  # micro-batches a step
        # prompts over all ranks; at least 1, because the loader raises for a batch size of 0
        micro_batch_size = max(1, datamodule.batch_size // accumulate)
        self.estimator.check_group_sizes(
            num_samples=micro_batch_size * self.group_size,
            group_size=self.group_size,
            accumulate=accumulate,
        )
        # all different characters of the prompts; provenance names their file, for the message
        check_prompt_characters(
            datamodule.characters, cast(Tokenizer, self.tokenizer), datamodule.provenance
        )
        for number, prompt in enumerate(datamodule.prompts):
            self._encode(prompt, f"prompt {number} of the file")  # raises if it is too long

    def build_net(self) -> Transformer:
        """Create the base model's net."""
        if self.vocab_size is None or self.context_length is None:
            raise UsageError(
                "Reinforce: the net's sizes come from base_checkpoint, which is not loaded yet",
                ["trainer.fit", "Reinforce.load_from_checkpoint"],
                "call trainer.fit, which loads the base model",
            )
        return Transformer(self.vocab_size, self.context_length, **self.net_kwargs)

    def configure_model(self) -> None:
        """Build the net, load the base model's weights and keep a frozen copy as the reference."""
        is_new = self.net is None
        super().configure_model()
        if is_new and self._base_model is not None and self.net is not None:
            self._load_weights(self.net, self._base_model.weights)
            self._base_model.weights.clear()
            if self.reference == "frozen_copy":
                self._reference_nets = (copy.deepcopy(self.net).requires_grad_(False).eval(),)

    @staticmethod
    def _load_weights(net: nn.Module, weights: dict[str, Tensor]) -> None:
        """Load weights into the net; a strategy that shards it reads their rows after sharding."""
        named_parameters = net.named_parameters(remove_duplicate=False)
        initial_values: dict[str, Any] = {
            n: getattr(p, "initial_values", None) for n, p in named_parameters
        }
        deferred = {name: values for name, values in initial_values.items() if values is not None}
        for name, values in deferred.items():
            values.set_source(weights[name])
        remaining = {name: tensor for name, tensor in weights.items() if name not in deferred}
        net.load_state_dict(
            remaining, strict=not deferred
        )  # names were checked when the base model was loaded

    def _can_defer_init(self) -> bool:
        return (
            self.reference != "frozen_copy" and super()._can_defer_init()
        )  # the copy is not sharded

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Generate completions, score them and compute advantages: the batch becomes a Rollout."""
        if not isinstance(batch, PromptBatch):
            raise UsageTypeError(
                "Reinforce needs batches of the class PromptBatch, but the dataloader returns "
                f"{type(batch).__name__}",
                ["PromptBatch"],
                "pass datamodule=PromptDataModule(...) to trainer.fit",
                flag="--data=PromptDataModule",
            )
        cast(nn.Module, self.net).eval()  # dropout would make sampler and learner different
        with self.trainer.precision_plugin.forward_context():  # Lightning calls hooks without it
            return self._make_rollout(batch)

    @property
    def plotted_metrics(self) -> tuple[str, ...]:
        """Names of the metric of each reward."""
        return tuple(f"train/{reward.name}" for reward in self.rewards)

    def training_step(self, rollout: Rollout, index: int) -> Tensor:
        """Policy-gradient loss of a rollout."""
        self._stopwatch.start("update")
        logprobs = compute_rollout_logprobs(self, rollout, self.sampling)  # (b n)
        loss = policy_loss(rollout, logprobs, self.estimator, self.kl, self.max_new_tokens)
        self.log("train/policy_loss", loss)
        self.log("train/logprob_gap", logprob_gap(logprobs, rollout))
        seconds = self._stopwatch.durations_s  # those of the update are of the previous step
        num_tokens = self._rollout_metrics["num_tokens"]
        throughput = {"tokens_per_second": num_tokens / sum(seconds.values())}
        for name, value in (self._rollout_metrics | throughput).items():
            self.log(f"train/{name}", torch.tensor(value))
        for name, value in seconds.items():
            self.log(f"time/{name}", torch.tensor(value))
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop the update's stopwatch; the next step logs its seconds."""
        self._stopwatch.stop("update")

    def validation_step(self, rollout: Rollout, index: int) -> None:
        """Log the metrics of the batch, which is the whole validation set."""
        self._log_eval_metrics("val", rollout)

    def test_step(self, rollout: Rollout, index: int) -> None:
        """Log the metrics of the batch, which is the whole test set."""
        self._log_eval_metrics("test", rollout)

    def count_units(self, batch: Rollout) -> int:
        """Upper bound of the generated tokens; an exact count would have to wait for the device."""
        return batch.tokens.numel()

    def last_samples(self) -> list[dict[str, Any]]:
        """Return this rank's last samples: prompt, text, reward and terms."""
        return self._last_samples

    generate = LanguageModel.generate
    export = LanguageModel.export

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save tokenizer and sizes with the weights, and the checksum of the reference."""
        super().on_save_checkpoint(checkpoint)
        tokenizer = None if self.tokenizer is None else self.tokenizer.state_dict()
        sizes = {"context_length": self.context_length, "net_kwargs": self.net_kwargs}
        checkpoint["language"] = {"tokenizer": tokenizer, **sizes}
        checkpoint["policy"] = {"base_fingerprint": self._base_fingerprint}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load tokenizer and sizes; raise UsageError if the reference is another base model.

        Lightning calls it before it loads the weights. When a fit is resumed, `setup` has loaded
        the base model already; `load_from_checkpoint` calls it without a trainer.
        """
        super().on_load_checkpoint(checkpoint)
        # saved_data_fields: a section of the checkpoint, or UsageError if it lacks these keys
        fields = "tokenizer", "context_length", "net_kwargs"
        saved = self.saved_data_fields(checkpoint, "language", fields)
        policy = self.saved_data_fields(checkpoint, "policy", ("base_fingerprint",))
        saved_fingerprint = policy["base_fingerprint"]
        if self._base_fingerprint is not None:  # `setup` has loaded the base model
            if self.reference != "none":  # the KL is measured to the base model
                base_model.check_fingerprint(
                    self.base_checkpoint, self._base_fingerprint, saved_fingerprint
                )
            return
        # without a trainer there is no base model: the checkpoint has the sizes
        self.tokenizer = tokenizer_from_state_dict(saved["tokenizer"])
        self.vocab_size, self.context_length = self.tokenizer.vocab_size, saved["context_length"]
        self.net_kwargs, self._base_fingerprint = saved["net_kwargs"], saved_fingerprint
        if "net.embed.weight" not in checkpoint["state_dict"]:  # adapters alone
            # `configure_model` loads its weights into the net
            self._base_model = base_model.load_base_for_adapters(
                self.base_checkpoint, saved_fingerprint
            )

    def _encode(self, prompt: str, description: str) -> Tensor:
        tokens = cast(Tokenizer, self.tokenizer).encode(prompt)
        check_prompt_length(
            description, prompt, len(tokens), self.max_new_tokens, cast(int, self.context_length)
        )
        return tokens

    def _stop_sequences(self) -> list[list[int]]:
        tokenizer = cast(Tokenizer, self.tokenizer)
        stops = [] if self.stop is None else [tokenizer.encode(self.stop).tolist()]
        return stops if tokenizer.eos_id is None else [*stops, [tokenizer.eos_id]]

    def _make_rollout(self, batch: PromptBatch) -> Rollout:
        """Generate texts after a batch of prompts, score them and compute advantages.

        The metrics and the samples are kept for the training step, which logs them.

        Axes: g prompts, b = g * group_size samples of this rank, n new tokens, t tokens of a text.
        """
        # the stopwatch measures the seconds of each phase, for the log
        stopwatch, group_size = self._stopwatch, self.group_size
        # each of `sample_ids` is (epoch, sample); `_encode` raises if a prompt is too long
        prompts = [
            self._encode(text, f"sample {sample}")
            for text, (_, sample) in zip(batch.texts, batch.sample_ids, strict=True)
        ]  # g prompts
        repeated_prompts = [prompt for prompt in prompts for _ in range(group_size)]  # b
        # with the seed, a row's key determines its tokens; it ends with the text's number
        row_keys = [
            ("rollout", *sample_id, g) for sample_id in batch.sample_ids for g in range(group_size)
        ]
        with stopwatch("rollout"):
            generated = self._generate_completions(repeated_prompts, row_keys)
        # input_ids (b t): prompt and new tokens, right-padded, without the last token;
        # logit_positions (b n): where in a text the logits predict its new tokens
        input_ids, logit_positions = pad_sequences_for_scoring(repeated_prompts, generated.tokens)
        # the same texts with each prompt once, to save time; None if the net does not support it
        shared_prefix = make_shared_prefix_batch(
            cast(nn.Module, self.net), prompts, generated.tokens
        )
        with stopwatch("reference"):
            ref_logprobs, ref_logprobs_t1 = self._compute_ref_logprobs(
                input_ids, logit_positions, generated, shared_prefix
            )
        # the scorer decodes the tokens, calls the rewards and computes advantages over all ranks
        with stopwatch("reward"):
            scored = self._make_scorer()(
                batch.texts, batch.columns, generated, ref_logprobs, ref_logprobs_t1
            )
        self._rollout_metrics, self._last_samples = scored.metrics, scored.rows
        return Rollout(
            input_ids,
            logit_positions,
            tokens=generated.tokens,
            mask=generated.mask,
            sampler_logprobs=generated.logprobs,
            advantages=scored.advantages.to(generated.logprobs),  # its device and dtype
            tokens_per_rank=scored.tokens_per_rank.to(generated.logprobs),
            ref_logprobs=ref_logprobs,
            shared_prefix=shared_prefix,
        )

    def _make_scorer(self) -> RolloutScorer:
        """Return the callable that computes rewards and advantages of a rollout on all ranks."""
        return RolloutScorer(
            self.rewards,
            self.estimator,
            self.kl,
            max_new_tokens=self.max_new_tokens,
            group_size=self.group_size,
            tokenizer=cast(Tokenizer, self.tokenizer),
            stop=self.stop,
            corpus_stats=self.corpus_stats,
            all_gather=self._gather_rows,
            dp_rank=DataParallelInfo.from_trainer(self.trainer).dp_rank,
        )

    def _generate_completions(
        self, prompts: list[Tensor], row_keys: list[tuple]
    ) -> GenerationOutput:
        """Generate tokens (b n) after b prompts; `row_keys` (b) with the seed determine them."""
        net = cast(nn.Module, self.net)
        # a sharded parameter is a DTensor, which has a device mesh
        is_unsharded = not any(hasattr(parameter, "device_mesh") for parameter in net.parameters())
        # resolve_seed(None) is the seed of the run
        kwargs: dict[str, Any] = {
            "stops": self._stop_sequences(), "seed": resolve_seed(None), "row_keys": row_keys,
            "context_overflow": "error",  # lengths are checked
            # ranks that shard a net need equal numbers of steps, even if their texts have ended
            "sync_every": SYNC_EVERY if is_unsharded else self.max_new_tokens,
            # no CUDA graph of a sharded net, whose weights move at each step
            "capture": capture_cuda_graph if is_unsharded and self.device.type == "cuda" else None,
        }  # fmt: skip
        # one process only, as in Lightning's validation: autograd takes a tenth of a rollout
        with torch.inference_mode(self.trainer.world_size == 1):
            context_length = cast(int, self.context_length)
            generated = generate(
                net, prompts, self.max_new_tokens, context_length, self.sampling, **kwargs
            )
        # autograd accepts clones, but not tensors of the inference mode
        return GenerationOutput(*(x.clone() for x in generated))

    def _compute_ref_logprobs(
        self,
        input_ids: Tensor,
        logit_positions: Tensor,
        generated: GenerationOutput,
        shared_prefix: SharedPrefixBatch | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the reference's logprobs (b n) at the sampling temperature and at 1.

        The reference is the frozen copy of the base model, or the policy with disabled adapters.
        Both results are None if there is no reference.

        Args:
            input_ids: texts (b t), right-padded.
            logit_positions: positions (b n) in the texts whose logits predict the new tokens.
            generated: the new tokens (b n) and their mask.
            shared_prefix: the same texts with each prompt once, if the net supports it.
        """
        inputs = (
            input_ids,
            logit_positions,
            generated.tokens,
            generated.mask,
            self.sampling,
            shared_prefix,
        )
        # each reference is called as net(tokens) or net(tokens, shared_prefix); self calls self.net
        if self.reference == "lora":
            with disable_adapters(cast(nn.Module, self.net)):
                return compute_ref_logprobs(self, *inputs)
        if self._reference_nets:
            # Lightning does not see this net, and so does not move it to the device
            (net,) = self._reference_nets
            return compute_ref_logprobs(net.to(self.device), *inputs)
        if self.reference == "frozen_copy":
            raise UsageError(
                "Reinforce: reference='frozen_copy' needs the base model, but this policy was "
                "loaded from a checkpoint without it",
                ["a policy that is trained by trainer.fit"],
                "create Reinforce(...) again, and pass ckpt_path=FILE to trainer.fit",
            )
        return None, None

    def _gather_rows(self, x: Tensor) -> Tensor:
        """Gather rows (b ...) of all data-parallel ranks, in order: (B ...)."""
        data_parallel = DataParallelInfo.from_trainer(self.trainer)
        gathered = torch.zeros(data_parallel.dp_size, *x.shape, dtype=x.dtype, device=self.device)
        gathered[data_parallel.dp_rank] = x
        return self.trainer.strategy.reduce(gathered, reduce_op="sum").flatten(0, 1).cpu()  # type: ignore

    def _log_eval_metrics(self, stage: str, rollout: Rollout) -> None:
        names = [n for n in self._rollout_metrics if not n.endswith("_std")]
        metrics = {f"{stage}/{name}": self._rollout_metrics[name] for name in names}
        self.log_dict(metrics, batch_size=len(rollout.tokens), sync_dist=True)
