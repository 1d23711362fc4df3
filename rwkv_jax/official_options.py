"""Options of the official trainers and of Lightning's Trainer that are not in `TrainConfig`.

The official train.py (RWKV-LM: RWKV-v4neo, RWKV-v5, RWKV-v7/train_temp) has its own options,
accepts those of `pytorch_lightning.Trainer` (1.9.5), and overwrites some of the latter. One table
defines the handling of each; docs/options.md shows it.
"""

import argparse
import datetime
from collections.abc import Callable
from typing import Any, NamedTuple

from rwkv_jax.errors import whole_number

OFF = ("0", "0.0", "False", "None", "")


class OfficialOption(NamedTuple):
    """The handling of an option.

    Attributes:
        reason: why it has no effect, or why other values are refused.
        agreeing: accepted values, ignoring case; None: any.
        becomes: the field of `TrainConfig` that gets its value; empty: it has no effect.
        parse: parses the value; None: use the field's parser.
    """

    reason: str
    agreeing: tuple[str, ...] | None = None
    becomes: str = ""
    parse: Callable[[str], Any] | None = None


def _each(
    names: str,
    reason: str,
    agreeing: tuple[str, ...] | None = None,
    becomes: str = "",
    parse: Callable[[str], Any] | None = None,
) -> dict[str, OfficialOption]:
    return dict.fromkeys(names.split(), OfficialOption(reason, agreeing, becomes, parse))


def device_count(text: str) -> int:
    """Parses Lightning's device count; 0 means all."""
    if "," in text:
        which = text.strip("[], ")
        raise argparse.ArgumentTypeError(
            f"{text!r} lists devices: set CUDA_VISIBLE_DEVICES={which} before the command, and "
            "give their number here"
        )
    if text not in ("auto", "-1") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")
    return 0 if text in ("auto", "-1") else whole_number(text)


def _gpus(text: str) -> int:
    if text == "0":
        raise argparse.ArgumentTypeError("0 GPUs: use --accelerator cpu to train without a GPU")
    return device_count(text)


def _minutes(text: str) -> float:
    """Parses Lightning's DD:HH:MM:SS into minutes."""
    try:
        days, hours, minutes, seconds = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form DD:HH:MM:SS") from None
    time = datetime.timedelta(days, hours=hours, minutes=minutes, seconds=seconds)
    return time / datetime.timedelta(minutes=1)


OFFICIAL_OPTIONS: dict[str, OfficialOption] = {
    # RWKV-v7/train_temp/train.py and its scripts.
    **_each("my_testing MODEL_TYPE", "every model here is x070", ("x070",)),
    **_each("dim_att", "in x070 it equals n_embd"),  # compared with it in parse_train_options
    **_each(
        "data_type",
        "text files are recognised by their extension; everything else is binidx",
        ("binidx", "jsonl"),
    ),
    **_each("ds_bucket_mb", "XLA chooses the size and schedule of communication"),
    **_each("kernel", "the WKV kernel is chosen by device and precision"),
    **_each("epoch_steps", "a miniepoch is 40320 samples in both trainers"),
    # RWKV-v4neo/train.py and RWKV-v5/train.py.
    **_each(
        "my_pile_stage",
        "its name is --train_stage since RWKV-7; 0 and 4 drew random samples, and 2 had other "
        "learning rates",
        ("3", "1"),
        "train_stage",
    ),
    **_each("head_size_a", "", None, "head_size"),
    **_each("head_size_divisor", "the epsilon of ln_x is 64e-5, which corresponds to 8", ("8",)),
    **_each("pre_ffn head_qk tiny_att_dim my_pos_emb", "x070 has no such part", (*OFF, "-1")),
    **_each("tiny_att_layer", "x070 has no tiny attention"),
    **_each("dropout", "x070 is trained without dropout", OFF),
    **_each("layerwise_lr", "w0 always has twice the learning rate", ("1",)),
    **_each("weight_decay_final", "the weight decay is constant", ("-1", "-1.0", *OFF)),
    **_each("my_pile_edecay", "the learning rate follows a cosine", OFF),
    **_each("my_pile_version", "all data is in one file", ("1",)),
    **_each("my_pile_shift", "samples begin at multiples of ctx_len", ("-1", *OFF)),
    **_each("my_random_steps", "no random samples are drawn", OFF),
    **_each("my_qa_mask", "every token counts in the loss", OFF),
    **_each("my_exit", "--epoch_count and --my_exit_tokens end a run", ("99999999",)),
    **_each("train_type", "all parameters are trained", OFF),
    **_each("my_ffn_shift my_att_shift", "the official source code does not read it either"),
    **_each(
        "my_sample_len my_img_version my_img_size my_img_bit my_img_clip my_img_clip_scale "
        "my_img_l1_scale my_img_encoder",
        "it belongs to a --data_type that is not supported",
    ),
    # Lightning's Trainer: options with an equivalent here.
    **_each("gradient_clip_val", "", None, "grad_clip"),
    **_each("gpus", "", None, "devices", _gpus),
    **_each("max_time", "", None, "max_minutes", _minutes),
    # … options that the official trainer overwrites, or that only unused parts read.
    **_each("max_epochs min_epochs min_steps", "--epoch_count and --my_exit_tokens end a run"),
    **_each("enable_checkpointing", "--epoch_save and --save_every_minutes choose what is saved"),
    **_each("logger", "--wandb and --tensorboard choose the trackers"),
    **_each("log_every_n_steps track_grad_norm", "step_log.tsv has every step and its norm"),
    **_each("replace_sampler_ddp", "the order of samples is the official one"),
    **_each(
        "num_sanity_val_steps check_val_every_n_epoch val_check_interval limit_val_batches "
        "limit_test_batches limit_predict_batches inference_mode",
        "neither trainer validates during training; use rwkv_jax.evaluate",
    ),
    **_each("auto_lr_find auto_scale_batch_size", "the official trainer calls no tuner either"),
    # … options without an object here.
    **_each("default_root_dir", "all output is in --proj_dir"),
    **_each("enable_model_summary", "one line describes the model"),
    **_each("profiler", "kt/s and MFU are in the progress line"),
    **_each("sync_batchnorm", "the model has no batch norm"),
    **_each("benchmark", "the option is for cuDNN; XLA chooses its own kernels"),
    **_each("detect_anomaly", "a step that is not finite is skipped and reported"),
    **_each("amp_backend amp_level", "--precision decides this"),
    **_each("move_metrics_to_cpu", "the metrics of a step are always fetched"),
    **_each("multiple_trainloader_mode", "there is one data file"),
    **_each(
        "reload_dataloaders_every_n_epochs",
        "the samples of a step depend on the step number alone",
    ),
    **_each("auto_select_gpus", "CUDA_VISIBLE_DEVICES selects GPUs"),
    # … options that would change the training or its device.
    **_each("gradient_clip_algorithm", "the gradient's global norm is clipped", ("norm", *OFF)),
    **_each("max_steps", "--epoch_count and --my_exit_tokens end a run", ("-1", "None")),
    **_each("fast_dev_run overfit_batches", "--my_exit_tokens shortens a run", OFF),
    **_each("limit_train_batches", "--my_exit_tokens shortens a run", ("1.0", "None")),
    **_each(
        "resume_from_checkpoint",
        "the run in --proj_dir is resumed automatically; --load_model loads weights",
        OFF,
    ),
    **_each("num_processes", "one process uses all --devices of a machine", ("1", *OFF)),
    **_each("tpu_cores ipus", "training runs on GPUs or on the CPU", OFF),
    **_each("callbacks plugins", "code is not loaded by name", OFF),
    # The launchers of DeepSpeed and torch.
    **_each("local_rank local-rank", "read from LOCAL_RANK"),
    **_each("deepspeed", "--strategy decides this"),
    **_each("deepspeed_config", "--strategy and the training options decide this", OFF),
}

# (option, official value) → our value.
OFFICIAL_VALUES: dict[tuple[str, str], str] = {
    # Lightning's strategies without sharding. The numbers are the same; this is the closest
    # strategy here.
    ("strategy", "ddp"): "deepspeed_stage_1",
    ("strategy", "ddp_find_unused_parameters_false"): "deepspeed_stage_1",
    ("strategy", "ddp_find_unused_parameters_true"): "deepspeed_stage_1",
    ("strategy", "deepspeed"): "deepspeed_stage_2",  # Lightning's default stage
    ("precision", "32"): "fp32",
    ("precision", "32-true"): "fp32",
    ("precision", "16"): "fp16",
    ("precision", "16-mixed"): "fp16",
    ("precision", "bf16-mixed"): "bf16",
}
