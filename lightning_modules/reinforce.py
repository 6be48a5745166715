"""REINFORCE: fine-tune a language model on what it writes, by a reward of any kind (lecture 7).

    prompts -> texts -> rewards -> weights    before the step, in `on_after_batch_transfer`
    loss = - mean_i w_i log p(text_i)         the step: a pure function of tensors

So clipping, optimizers, accumulation and strategies see a usual training step. What is drawn for a
prompt depends on (seed, epoch, sample) alone; nothing is kept from one step to the next.

Axes: b samples of this rank, B of all ranks, n new tokens, v vocabulary.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ravine.datamodules.loaders import Share, global_seed
from ravine.datamodules.prompts import Prompts
from ravine.datamodules.tokenizers import Tokenizer, from_state
from ravine.errors import UsageError, UsageTypeError

from .generation.cuda_graphs import cuda_graph
from .generation.generate_text import LOOK, Generated, generate, lay_out
from .generation.sampling import Sampling
from .generation.shared_prefix import Branches
from .language_model import LanguageModel
from .nn import Transformer
from .rl import base_model
from .rl.advantages import Estimator
from .rl.kl import KL
from .rl.rewards.base import Facts, Reward, check_terms
from .rl.rollout import (
    Rollout,
    adapters_off,
    branches_for,
    by_reference,
    drift,
    log_probabilities,
    loss_of,
)
from .rl.scoring import Judge
from .rl.stopwatch import Clock
from .rl.validation import check_fits, check_known, check_together
from .task_module import TaskModule


class Reinforce(TaskModule):
    """A language model tuned by policy gradient; batches are `Prompts`.

    model = Reinforce("runs/reinforce/base", rewards=[CharacterFraction("eE", weight=-1)])
    Trainer(max_steps=75).fit(model, datamodule=PromptDataModule(length=256))

    Args:
        base: checkpoint of the language model to start from, or its run's folder.
        rewards: the terms, added up.
        new: most tokens to write after a prompt.
        group_size: texts for each prompt; they stay on one rank.
        sampling: how to draw, and to score what was drawn.
        estimator: from rewards to the loss.
        kl: how to stay near the reference.
        reference: copy keeps the base beside the policy; lora is the policy with its adapters
            switched off, at no cost in memory; none saves a forward pass, and measures no KL.
        stop: a text that ends what is written; it belongs to what is learned.
    """

    unit, headline = "tokens", ("train/reward", "train/kl")
    lr = 1e-4
    whole_along = ("cp", "pp")  # what was written has no parts yet when a strategy would cut it

    def __init__(
        self,
        base: str,
        rewards: Sequence[Reward] | Reward = (),
        new: int = 256,
        group_size: int = 1,
        sampling: Sampling = Sampling(0.8),  # noqa: B008 - immutable, as the next ones
        estimator: Estimator = Estimator(),  # noqa: B008
        kl: KL = KL(),  # noqa: B008
        reference: Literal["copy", "lora", "none"] = "copy",
        stop: str | None = None,
    ) -> None:
        """Check what can be checked without data."""
        super().__init__()
        self.save_hyperparameters("base", "new", "group_size", "reference", "stop")
        self.base, self.new, self.group_size = base, new, group_size
        self.rewards = [rewards] if isinstance(rewards, Reward) else list(rewards)
        self.sampling, self.estimator, self.kl = sampling, estimator, kl
        self.reference, self.stop = reference, stop
        self.vocabulary: int | None = None
        self.context: int | None = None
        self.shape: dict[str, Any] = {}
        self.tokenizer: Tokenizer | None = None
        self.corpus: Facts | None = None
        self._start: base_model.BaseModel | None = None
        self._sha256: str | None = None  # of the base's weights
        # in a tuple, where nn.Module does not look: no optimizer, no checkpoint, no sharding
        self._frozen: tuple[nn.Module, ...] = ()
        self._clock, self._metrics = Clock(), dict[str, float]()
        self._written: list[dict[str, Any]] = []
        check_together(new, group_size, sampling, kl, reference, stop)

    def setup(self, stage: str) -> None:
        """Read the base model, then look at the data."""
        # they are one another's: the data give prompts, and the hook below makes a batch of them
        warnings.filterwarnings("ignore", "You have overridden `on_after_batch_transfer`")
        if self._start is None and self.net is None:
            self._start = start = base_model.read(self.base)
            self.vocabulary, self.context = start.vocabulary, start.context
            self.shape, self.tokenizer = start.shape, start.tokenizer
            self._sha256 = start.sha256
        super().setup(stage)
        check_terms(self.rewards, self.corpus is not None, self.reference != "none")
        self._stops()  # a stop that the tokenizer does not know

    def adopt(self, datamodule: Any) -> None:
        """Take the corpus; refuse other data than prompts, and prompts that are too long."""
        if not hasattr(datamodule, "prompts"):
            raise UsageError(
                f"Reinforce learns from prompts, and {type(datamodule).__name__} has none; "
                "type --data=PromptDataModule"
            )
        self.corpus = None if datamodule.text is None else Facts(datamodule.text)
        accumulate = Share.of(self.trainer).accumulate
        micro = max(1, datamodule.batch_size // accumulate)  # of none the loader will speak
        self.estimator.check(micro * self.group_size, self.group_size, accumulate)
        check_known(datamodule.characters, cast(Tokenizer, self.tokenizer), datamodule.resolved)
        for number, prompt in enumerate(datamodule.prompts):
            self._encode(prompt, f"prompt {number} of the file")

    def build(self) -> Transformer:
        """The base's net."""
        assert self.vocabulary is not None
        assert self.context is not None
        return Transformer(self.vocabulary, self.context, **self.shape)

    def configure_model(self) -> None:
        """Build the net, give it the base's weights, and keep a frozen copy of them."""
        built = self.net is None
        super().configure_model()
        if built and self._start is not None and self.net is not None:
            self._read(self.net, self._start.weights)
            self._start.weights.clear()
            if self.reference == "copy":
                self._frozen = (copy.deepcopy(self.net).requires_grad_(False).eval(),)

    @staticmethod
    def _read(net: nn.Module, weights: dict[str, Tensor]) -> None:
        """Give the net its weights; a strategy that shards it reads their rows after sharding."""
        named = net.named_parameters(remove_duplicate=False)
        sources: dict[str, Any] = {n: getattr(p, "initial_values", None) for n, p in named}
        later = {name: values for name, values in sources.items() if values is not None}
        for name, values in later.items():
            values.read_from(weights[name])
        rest = {name: tensor for name, tensor in weights.items() if name not in later}
        net.load_state_dict(rest, strict=not later)  # names were compared when they were read

    def _may_wait(self) -> bool:
        return self.reference != "copy" and super()._may_wait()  # the copy is not sharded

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Write, judge and weigh: the batch of the step is a Rollout."""
        if not isinstance(batch, Prompts):
            raise UsageTypeError(
                f"Reinforce learns from Prompts, and the loader gives {type(batch).__name__}; "
                "use PromptDataModule"
            )
        cast(nn.Module, self.net).eval()  # dropout would make sampler and learner two policies
        with self.trainer.precision_plugin.forward_context():  # a hook is outside of it
            return self._roll(batch)

    def training_step(self, rollout: Rollout, index: int) -> Tensor:
        """The loss of a rollout."""
        self._clock.start("update")
        log_p = log_probabilities(self, rollout, self.sampling)  # (b n)
        loss = loss_of(rollout, log_p, self.estimator, self.kl, self.new)
        self.log("train/surrogate", loss)
        self.log("train/drift", drift(log_p, rollout))
        seconds = self._clock.seconds  # of the update, those of the step before
        pace = {"tokens_per_second": self._metrics["tokens"] / sum(seconds.values())}
        for name, value in (self._metrics | seconds | pace).items():
            self.log(f"train/{name}", torch.tensor(value))
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop the clock of the update; its seconds are logged with the next step's."""
        self._clock.stop("update")

    def validation_step(self, rollout: Rollout, index: int) -> None:
        """What was measured of the batch, which is the whole set."""
        self._log_stage("val", rollout)

    def test_step(self, rollout: Rollout, index: int) -> None:
        """As in validation."""
        self._log_stage("test", rollout)

    def count(self, batch: Rollout) -> int:
        """Tokens written: at most, since to know exactly would mean to wait for the device."""
        return batch.tokens.numel()

    def samples(self) -> list[dict[str, Any]]:
        """This rank's last samples: prompt, text, reward, terms."""
        return self._written

    generate = LanguageModel.generate
    export = LanguageModel.export

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The tokenizer and the sizes travel with the weights; the reference by its checksum."""
        super().on_save_checkpoint(checkpoint)
        tokenizer = None if self.tokenizer is None else self.tokenizer.state()
        sizes = {"context": self.context, "shape": self.shape}
        checkpoint["language"] = {"tokenizer": tokenizer, **sizes}
        checkpoint["policy"] = {"base": self._sha256}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them from a checkpoint; refuse one that has another base as its reference."""
        super().on_load_checkpoint(checkpoint)
        saved, base = checkpoint["language"], checkpoint["policy"]["base"]
        if self._sha256 is not None:
            if self.reference != "none":
                base_model.check_same(self.base, self._sha256, base)
            return
        # no trainer, no base: the checkpoint knows the sizes
        self.tokenizer = from_state(saved["tokenizer"])
        self.vocabulary, self.context = self.tokenizer.vocabulary, saved["context"]
        self.shape, self._sha256 = saved["shape"], base
        if "net.embed.weight" not in checkpoint["state_dict"]:  # adapters alone
            self._start = base_model.behind_adapters(self.base, base)

    def _encode(self, prompt: str, what: str) -> Tensor:
        tokens = cast(Tokenizer, self.tokenizer).encode(prompt)
        check_fits(what, prompt, len(tokens), self.new, cast(int, self.context))
        return tokens

    def _stops(self) -> list[list[int]]:
        tokenizer = cast(Tokenizer, self.tokenizer)
        stops = [] if self.stop is None else [tokenizer.encode(self.stop).tolist()]
        return stops if tokenizer.end is None else [*stops, [tokenizer.end]]

    def _roll(self, batch: Prompts) -> Rollout:
        """Texts, rewards and weights for a batch of prompts."""
        clock, group = self._clock, self.group_size
        prompts = [
            self._encode(text, f"sample {sample}")
            for text, (_, sample) in zip(batch.texts, batch.places, strict=True)
        ]
        rows = [prompt for prompt in prompts for _ in range(group)]
        keys = [("rollout", *place, g) for place in batch.places for g in range(group)]
        with clock("rollout"):
            written = self._write(rows, keys)
        text, places = lay_out(rows, written.tokens)
        branches = branches_for(cast(nn.Module, self.net), prompts, written.tokens)
        with clock("reference"):
            warm, plain = self._ask_reference(text, places, written, branches)
        with clock("reward"):
            judged = self._judge()(batch.texts, batch.columns, written, warm, plain)
        self._metrics, self._written = judged.metrics, judged.rows
        tokens, log_p, mask = written
        weights, share = judged.weights.to(log_p), judged.share.to(log_p)
        return Rollout(text, places, tokens, mask, log_p, weights, share, warm, branches)

    def _judge(self) -> Judge:
        how = self.rewards, self.estimator, self.kl, self.new, self.group_size
        whose = cast(Tokenizer, self.tokenizer), self.stop, self.corpus
        return Judge(*how, *whose, self._gathered, Share.of(self.trainer).rank)

    def _write(self, prompts: list[Tensor], keys: list[tuple]) -> Generated:
        net = cast(nn.Module, self.net)
        whole = not any(hasattr(parameter, "device_mesh") for parameter in net.parameters())
        how: dict[str, Any] = {
            "stops": self._stops(), "seed": global_seed(None), "texts": keys, "window": "refuse",
            # ranks that shard a net take every step together, however soon their texts have ended
            "look": LOOK if whole else self.new,
            "capture": cuda_graph if whole and self.device.type == "cuda" else None,
        }  # fmt: skip
        # alone as Lightning validates: keeping books for gradients is a tenth of a rollout
        with torch.inference_mode(self.trainer.world_size == 1):
            context = cast(int, self.context)
            written = generate(net, prompts, self.new, context, self.sampling, **how)
        return Generated(*(x.clone() for x in written))  # what gradients may pass through again

    def _ask_reference(
        self, text: Tensor, places: Tensor, written: Generated, branches: Branches | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Log-probabilities (b n) at the sampling temperature, and at 1."""
        what = text, places, written.tokens, written.mask, self.sampling, branches
        if self.reference == "lora":
            with adapters_off(cast(nn.Module, self.net)):
                return by_reference(self, *what)
        for net in self._frozen:
            return by_reference(net.to(self.device), *what)
        if self.reference == "copy":
            raise UsageError(
                "this policy was loaded, and has no copy of its base; make it anew and go on with "
                "fit(..., ckpt_path=FILE)"
            )
        return None, None

    def _gathered(self, x: Tensor) -> Tensor:
        """Rows (b ...) of all ranks that see different data, in order: (B ...)."""
        share = Share.of(self.trainer)
        whole = torch.zeros(share.size, *x.shape, dtype=x.dtype, device=self.device)
        whole[share.rank] = x
        return self.trainer.strategy.reduce(whole, reduce_op="sum").flatten(0, 1).cpu()  # type: ignore

    def _log_stage(self, stage: str, rollout: Rollout) -> None:
        names = [n for n in self._metrics if not n.endswith("_spread")]
        found = {f"{stage}/{name}": self._metrics[name] for name in names}
        self.log_dict(found, batch_size=len(rollout.tokens), sync_dist=True)
