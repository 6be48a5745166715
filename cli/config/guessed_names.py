"""Names of flags in other programs, and the argument of Ravine that each of them means.

The names are those of nanoGPT, Hugging Face, torchtune, accelerate and Lightning. `flag_guesses.py`
suggests flags from this table, and `early_checks.py` does so before torch is imported.
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

PRECISIONS = {
    **dict.fromkeys(("bf16", "bfloat16", "mixed"), "bf16-mixed"),
    **dict.fromkeys(("16", "fp16", "float16", "half", "amp"), "16-mixed"),
    **dict.fromkeys(("32", "fp32", "float32", "float", "single", "no", "tf32"), "32-true"),
    **dict.fromkeys(("64", "fp64", "float64", "double"), "64-true"),
}
# Short forms that Lightning accepts with a warning; they are not suggested.
DISCOURAGED_PRECISIONS = ("64", "32", "16", "bf16")
STRATEGIES = {
    **dict.fromkeys(("fsdp2", "deepspeed", "full_shard", "true"), "zero3"),
    **dict.fromkeys(("dp", "multi_gpu", "distributed"), "ddp"),
    "1": "zero1",
    "2": "zero2",
    "3": "zero3",
}
SCHEDULES = {
    "cosine_with_restarts": "cosine_restarts",
    **dict.fromkeys(("cosineannealing", "cosineannealinglr"), "cosine"),
    **dict.fromkeys(("constant_with_warmup", "none", "no", "false"), "constant"),
    **dict.fromkeys(("steplr", "multistep"), "step"),
    **dict.fromkeys(("warmup_stable_decay", "trapezoidal"), "wsd"),
}
SOURCES = {"tinyshakespeare": "shakespeare", "tiny_shakespeare": "shakespeare"}
LOGGERS = {"tb": "tensorboard", "none": "false"}
CHECKPOINTS = {**dict.fromkeys(("true", "1", "latest", "resume"), "auto"), "scratch": "null"}
ON = ("", "true", "1", "yes", "on")  # values of a flag that switches something on
# Flags of `generate`, which the commands of the trainer do not have.
GENERATE_FLAGS = (
    *("prompt", "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "num_samples"),
    *("labels", "guidance_scale", "sampler"),
)
OFF = ("false", "0", "no", "off", "none")


class Guess(NamedTuple):
    """What a guessed name means.

    Args:
        keys: the arguments, the best first. `optimizer.X` and `schedule.X` are arguments of the
            run's optimizer callback; `EMA.decay` is one of a callback; `EMA` is the callback.
        value: the value of a flag without one, or with a value that only switches it on.
        values: other words for values.
    """

    keys: tuple[str, ...]
    value: str = ""
    values: Mapping[str, str] = MappingProxyType({})


def _guesses(rows: Iterable[tuple[str, Guess]]) -> dict[str, Guess]:
    return {name: guess for names, guess in rows for name in names.split()}


GUESSES = _guesses(
    [
        # length of the run
        (
            "steps num_steps n_steps max_iters max_iterations iterations iters num_iterations "
            "total_steps max_train_steps max_steps_per_epoch train_steps num_train_steps",
            Guess(("trainer.max_steps",)),
        ),
        (
            "epochs epoch num_epochs n_epochs num_train_epochs train_epochs max_epoch",
            Guess(("trainer.max_epochs",)),
        ),
        ("time max_hours time_limit", Guess(("trainer.max_time",))),
        # optimizer
        (
            "lr learning_rate max_lr base_lr peak_lr init_lr rate alpha_lr",
            Guess(("optimizer.lr", "model.lr", "model.learning_rate")),
        ),
        ("weight_decay wd l2", Guess(("optimizer.weight_decay",))),
        ("momentum", Guess(("optimizer.momentum",))),
        ("betas adam_betas", Guess(("optimizer.betas",))),
        ("eps epsilon adam_epsilon", Guess(("optimizer.eps",))),
        ("optimizer optim optimiser optimizer_name opt", Guess(("optimizer",))),
        # schedule
        (
            "lr_scheduler lr_scheduler_type scheduler lr_schedule schedule sched lr_decay "
            "lr_policy",
            Guess(("schedule.kind",), "cosine", SCHEDULES),
        ),
        (
            "warmup warmup_steps warmup_iters num_warmup_steps lr_warmup_steps warmup_ratio "
            "warmup_updates",
            Guess(("schedule.warmup",)),
        ),
        ("min_lr_ratio final_lr_fraction", Guess(("schedule.final_fraction",))),
        # batches
        (
            "batch_size batchsize bs batch train_batch_size per_device_train_batch_size "
            "per_device_batch_size micro_batch_size mini_batch_size per_device_eval_batch_size "
            "eval_batch_size val_batch_size device_batch_size",
            Guess(("data.batch_size",)),
        ),
        (
            "gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad accum_iter "
            "gradient_accumulation accumulation_steps",
            Guess(("trainer.accumulate_grad_batches",)),
        ),
        (
            "grad_clip gradient_clip max_grad_norm clip_grad_norm clip_grad clip_norm grad_norm "
            "gradient_clip_val gradient_clipping clip",
            Guess(("GradientClipping.max_norm",), "1.0"),
        ),
        (
            "num_workers workers dataloader_num_workers n_workers",
            Guess(("data.num_workers",)),
        ),
        # reproducibility, machine
        (
            "seed random_seed manual_seed rng_seed random_state global_seed",
            Guess(("seed_everything",)),
        ),
        (
            "gpus num_gpus n_gpus ngpus gpu num_devices n_gpu nproc_per_node num_processes nproc",
            Guess(("trainer.devices",)),
        ),
        ("devices", Guess(("trainer.devices",))),
        ("nodes nnodes num_machines n_nodes", Guess(("trainer.num_nodes",))),
        ("device accelerator backend", Guess(("trainer.accelerator",))),
        ("cpu no_cuda use_cpu", Guess(("trainer.accelerator",), "cpu")),
        (
            "precision dtype mixed_precision torch_dtype compute_dtype",
            Guess(("trainer.precision",), "auto", PRECISIONS),
        ),
        ("bf16 bfloat16", Guess(("trainer.precision",), "bf16-mixed")),
        ("fp16 float16 half amp use_amp", Guess(("trainer.precision",), "16-mixed")),
        ("fp32 float32 tf32", Guess(("trainer.precision",), "32-true")),
        (
            "strategy fsdp deepspeed parallel distributed_strategy distributed_type use_fsdp "
            "zero zero_stage",
            Guess(("trainer.strategy",), "zero3", STRATEGIES),
        ),
        ("ddp multi_gpu distributed use_ddp", Guess(("trainer.strategy",), "ddp")),
        # memory and speed
        ("compile torch_compile use_compile", Guess(("Compile",))),
        (
            "gradient_checkpointing activation_checkpointing checkpoint_activations grad_ckpt "
            "enable_activation_checkpointing",
            Guess(("ActivationCheckpointing",)),
        ),
        # adapters, averages
        ("lora use_lora peft use_peft", Guess(("LoRA",))),
        ("lora_rank lora_r r", Guess(("LoRA.rank",))),
        ("lora_alpha", Guess(("LoRA.alpha",))),
        ("lora_dropout", Guess(("LoRA.dropout",))),
        ("ema use_ema", Guess(("EMA",))),
        ("ema_decay ema_rate", Guess(("EMA.decay",))),
        ("load_in_4bit quantize qlora", Guess(("Quantization",))),
        # validation, files, logs
        (
            "eval_interval eval_steps eval_every val_every val_interval validate_every "
            "eval_freq val_check",
            Guess(("trainer.val_check_interval",)),
        ),
        (
            "eval_iters eval_batches val_batches max_eval_batches limit_val",
            Guess(("trainer.limit_val_batches",)),
        ),
        ("limit_train train_batches", Guess(("trainer.limit_train_batches",))),
        (
            "log_interval logging_steps log_every log_freq print_freq log_every_n",
            Guess(("trainer.log_every_n_steps",)),
        ),
        (
            "save_steps save_every save_interval checkpoint_interval ckpt_interval save_freq",
            Guess(("Checkpoint.every_n_train_steps",)),
        ),
        (
            "save_total_limit save_top_k keep_checkpoints",
            Guess(("Checkpoint.save_top_k",)),
        ),
        (
            "monitor metric_for_best_model best_metric",
            Guess(("Checkpoint.monitor",), "val/loss"),
        ),
        ("early_stopping early_stop", Guess(("EarlyStopping.monitor",), "val/loss")),
        ("patience early_stopping_patience", Guess(("EarlyStopping.patience",))),
        (
            "output_dir out_dir outdir output save_dir log_dir logdir logging_dir run_dir runs "
            "default_root_dir root_dir exp_dir experiment_dir ckpt_dir checkpoint_dir",
            Guess(("trainer.default_root_dir",)),
        ),
        (
            "run_name exp_name experiment experiment_name wandb_run_name job_name project",
            Guess(("trainer.name",)),
        ),
        ("name", Guess(("trainer.name",))),
        (
            "wandb wandb_log use_wandb with_wandb wandb_project wandb_entity",
            Guess(("trainer.logger",), "wandb"),
        ),
        ("tensorboard use_tensorboard", Guess(("trainer.logger",), "tensorboard")),
        ("mlflow", Guess(("trainer.logger",), "mlflow")),
        ("report_to log_with logger loggers", Guess(("trainer.logger",), "true", LOGGERS)),
        (
            "resume resume_from resume_from_checkpoint resume_path continue restore init_from "
            "checkpoint checkpoint_path ckpt load load_checkpoint load_from weights "
            "model_path ckpt_path",
            Guess(("ckpt_path",), "auto", CHECKPOINTS),
        ),
        (
            "dry_run debug_run smoke_test sanity_check fast_dev test_run",
            Guess(("trainer.fast_dev_run",), "true"),
        ),
        ("overfit overfit_batch", Guess(("trainer.overfit_batches",), "1")),
        ("progress progress_bar disable_tqdm", Guess(("trainer.enable_progress_bar",), "true")),
        ("benchmark profile profiling", Guess(("trainer.profiler",), "simple")),
        # data
        ("dataset dataset_name data_name task", Guess(("data.source",), "", SOURCES)),
        (
            "data_dir data_path dataset_dir dataset_path train_file train_data data_root input "
            "file text text_file",
            Guess(("data.path", "data.source", "data.root")),
        ),
        ("val_split validation_split val_ratio", Guess(("data.val_fraction",))),
        (
            "block_size seq_len seq_length sequence_length max_seq_len max_seq_length "
            "context context_size context_len max_length n_ctx ctx_len",
            Guess(("data.context_length",)),
        ),
        ("tokenizer_name tokenizer_path", Guess(("data.tokenizer",))),
        # sizes of the model
        (
            "layers n_layer n_layers num_hidden_layers depth num_blocks n_blocks",
            Guess(("model.num_layers",)),
        ),
        (
            "heads n_head n_heads num_attention_heads nhead",
            Guess(("model.num_heads",)),
        ),
        (
            "width n_embd d_embed hidden_size hidden_dim embed_dim embedding_dim dim dmodel "
            "emb_dim",
            Guess(("model.d_model", "model.base_channels")),
        ),
        ("intermediate_size ffn_dim mlp_dim d_mlp", Guess(("model.d_ff",))),
        ("n_kv_heads num_key_value_heads", Guess(("model.num_kv_heads",))),
        ("channels base_dim", Guess(("model.base_channels",))),
        ("beta kl_penalty", Guess(("model.kl_coef",))),
        ("model_name_or_path model_name pretrained", Guess(("Pretrained.path",))),
    ]
)


def canonical(name: str) -> str:
    """Return a name in lower case, with underscores: Batch-Size is batch_size."""
    return re.sub(r"[-\s]+", "_", name.strip("-+ ")).lower()
