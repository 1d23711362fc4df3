"""What a model and a run are made of, and the command line that is generated from it.

`TrainConfig`'s fields are the options of `python -m rwkv_jax.train`: name, type, default and help
stand together, once. The names are the official trainer's.
"""

import argparse
import dataclasses
import math
from typing import Any

from rwkv_jax.errors import CommandParser, UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of an RWKV-7 (x070) model: all that is needed to build its tensors.

    Letters as in the shapes throughout: L layers, C width, V vocabulary, H heads of size N,
    F the channel mix's inner width.

    >>> ModelConfig(n_layer=12, n_embd=768).n_head
    12
    """

    n_layer: int
    n_embd: int
    vocab_size: int = 65536
    head_size: int = 64
    dim_ffn: int = 0  # 0: 4·n_embd
    dim_w: int = 0  # low-rank width of the decay; 0 (each of the four): `default_low_rank`
    dim_a: int = 0  # … of the in-context learning rate
    dim_v: int = 0  # … of the value residual
    dim_g: int = 0  # … of the output gate

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_embd", "vocab_size", "head_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give 1 or more")
        if self.n_embd % self.head_size:
            raise UserError(
                f"--n_embd {self.n_embd} is not a multiple of --head_size {self.head_size}: "
                f"try {max(1, round(self.n_embd / self.head_size)) * self.head_size}"
            )
        defaults = {"dim_ffn": 4 * self.n_embd, **default_low_rank(self.n_embd)}
        for name, value in defaults.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size


def default_low_rank(n_embd: int) -> dict[str, int]:
    """The low-rank widths of a fresh model: max(32, round(f·√C/32)·32), half to even.

    >>> default_low_rank(768)
    {'dim_w': 64, 'dim_a': 64, 'dim_v': 32, 'dim_g': 128}
    """

    def width(factor: float) -> int:
        return max(32, round(factor * math.sqrt(n_embd) / 32) * 32)

    return {"dim_w": width(2.5), "dim_a": width(2.5), "dim_v": width(1.7), "dim_g": width(5.0)}


HEAD_SIZES = (16, 32, 64, 128)  # that the WKV operation takes

# name: (n_layer, n_embd). `tiny` is for smoke runs: it trains in minutes on a CPU.
SIZES = {
    "tiny": (6, 128),
    "0.1b": (12, 768),
    "0.4b": (24, 1024),
    "1.5b": (24, 2048),
    "2.9b": (32, 2560),
    "7.2b": (32, 4096),
    "13.3b": (61, 4096),
}
SIZE_ALIASES = {"3b": "2.9b"}

# The low-rank widths (dim_w, dim_a, dim_v, dim_g) of the released G1 models.
G1_LOW_RANK = {
    "0.1b": (64, 64, 32, 128),
    "0.4b": (64, 64, 32, 128),
    "1.5b": (96, 96, 64, 256),
    "2.9b": (96, 96, 64, 320),
    "7.2b": (128, 128, 96, 480),
    "13.3b": (192, 192, 128, 384),
}


AUTO = -1  # what `--micro_bsz auto` becomes


def _number_or_auto(text: str) -> int:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")
    return AUTO if text == "auto" else int(text)


def _option(default: Any, group: str, text: str, *choices: Any, least: float | None = None) -> Any:
    """A field of `TrainConfig` that becomes `--name`; `least` is the smallest value allowed."""
    return dataclasses.field(
        default=default,
        metadata={"group": group, "help": text, "choices": choices or None, "least": least},
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The options of `python -m rwkv_jax.train`, in the groups and words of its `--help`."""

    # fmt: off
    size: str = _option(
        "", "model", "sets n_layer and n_embd (default 0.1b)", "", *SIZES, *SIZE_ALIASES)
    n_layer: int = _option(0, "model", "layers L; overrides --size", least=0)
    n_embd: int = _option(0, "model", "width C; overrides --size", least=0)
    vocab_size: int = _option(65536, "model", "rows of embedding and head, V", least=2)
    head_size: int = _option(64, "model", "width of a head, N", *HEAD_SIZES)
    dim_ffn: int = _option(0, "model", "inner width of the channel mix; 0: 4·n_embd", least=0)
    lora_dims: str = _option(
        "formula", "model", "low-rank widths of a fresh model: those of the official formula "
        "(formula), of the released G1 model of this --size (g1), or four numbers w,a,v,g")
    load_model: str = _option(
        "", "model", "start from these weights, whose shape decides the model's: a .pth, the "
        "output folder of a run, or one of its checkpoints")
    load_partial: int = _option(
        0, "model", "1: tensors that the file lacks get their fresh initial value", 0, 1)
    random_seed: int = _option(0, "model", "seed of fresh initial weights", least=0)

    data_file: str = _option(
        "", "data", 'X.jsonl with a "text" in each line, or X for the token files X.bin and '
        "X.idx (default: the checkout's data/demo.jsonl)")
    ctx_len: int = _option(512, "data", "tokens in a sample, T", least=1)
    my_exit_tokens: int = _option(
        0, "data", "train on this many tokens, then write rwkv-final.pth; 0: as many as the data "
        "holds", least=0)
    magic_prime: int = _option(
        0, "data", "the sampler's prime for this data and ctx_len; 0: computed; a given one is "
        "checked", least=0)

    micro_bsz: int = _option(
        0, "training", "samples a device holds at once; 0: 1 on a CPU, 8 on a GPU; auto: as many "
        "as fit the device's memory (takes a few compilations to find out)", least=AUTO)
    accumulate_grad_batches: int = _option(
        1, "training", "micro batches whose gradients are averaged into one step", least=1)
    lr_init: float = _option(0.0, "training", "peak learning rate; 0: 0.45/n_embd", least=0)
    lr_final: float = _option(0.0, "training", "final learning rate; 0: 0.04/n_embd", least=0)
    warmup_steps: int = _option(10, "training", "steps of linear warm-up from 1%", least=0)
    beta1: float = _option(0.9, "training", "Adam's β₁", least=0)
    beta2: float = _option(0.99, "training", "Adam's β₂", least=0)
    adam_eps: float = _option(1e-18, "training", "Adam's ε, outside the root", least=0)
    weight_decay: float = _option(
        0.001, "training", "decoupled weight decay of the matrices", least=0)
    grad_clip: float = _option(
        1.0, "training", "largest global norm of the gradient; 0: any", least=0)
    grad_cp: int = _option(
        -1, "training", "1: recompute each block in the backward pass, to save memory; 2: all of "
        "it but its matrix products; 0: nothing; -1: 0 on a CPU, 1 on a GPU", -1, 0, 1, 2)
    head_chunk: int = _option(
        0, "training", "tokens of a sequence whose logits exist at once; 0: automatic", least=0)
    precision: str = _option(
        "auto", "training", "of the forward and backward pass (weights and Adam are float32); "
        "auto: fp32 on a CPU, bf16 on a GPU, fp16 with a loss scale on one older than Ampere",
        "auto", "bf16", "fp32", "tf32", "fp16")
    epoch_count: int = _option(
        0, "training", "stop after so many miniepochs of 40320 samples, even before "
        "my_exit_tokens; 0: do not", least=0)
    epoch_begin: int = _option(
        0, "training", "miniepoch to begin with, when weights alone are loaded", least=0)
    train_stage: int = _option(
        3, "training", "1: write rwkv-init.pth and stop; 2, 3: train, and continue from the last "
        "rwkv-{n}.pth of a folder without checkpoints; 0: train, without a look at those", 0, 1, 2,
        3)

    proj_dir: str = _option("out", "output", "folder of the .pth files, checkpoints and logs")
    epoch_save: int = _option(
        1, "output", "write rwkv-{n}.pth and a checkpoint every so many miniepochs; 0: never",
        least=0)
    save_every_steps: int = _option(
        0, "output", "write a checkpoint every so many steps as well; 0: never", least=0)
    save_every_minutes: float = _option(
        30.0, "output", "write a checkpoint every so many minutes as well; 0: never", least=0)
    keep_last: int = _option(2, "output", "checkpoints that are kept, the newest", least=1)
    max_minutes: float = _option(
        0.0, "output", "save and stop after so many minutes, for jobs with a time limit (leave "
        "time for the save); 0: do not", least=0)
    resume_anyway: int = _option(
        0, "output", "1: go on from the checkpoint although the data, ctx_len, the batch or what "
        "the run began with has changed, at as many tokens as were done", 0, 1)
    plot: int = _option(
        0, "output", "1: draw the loss as it falls, in proj_dir/loss.html and loss.png", 0, 1)
    wandb: str = _option("", "output", "Weights & Biases project to log to; empty: none")
    tensorboard: int = _option(
        0, "output", "1: write TensorBoard's event files to proj_dir/tensorboard", 0, 1)
    enable_progress_bar: str = _option(
        "auto", "output", "auto: a bar on a terminal, lines in a file", "auto", "True", "False")

    accelerator: str = _option("auto", "machine", "what to run on", "auto", "gpu", "cpu")
    devices: int = _option(0, "machine", "how many of them, on each machine; 0: all", least=0)
    num_nodes: int = _option(
        1, "machine", "machines that train together; every one runs the same command "
        "(docs/many-gpus.md)", least=1)
    coordinator_address: str = _option(
        "", "machine", "HOST:PORT of the first machine, where neither SLURM nor Open MPI nor "
        "Kubernetes tells it")
    process_id: int = _option(
        -1, "machine", "number of this machine, from 0; with --coordinator_address", least=-1)
    strategy: str = _option(
        "auto", "machine", "sharded over the devices: Adam's moments and the master weights "
        "(stage_1 or zero1), the gradients too (stage_2 or zero2), the parameters too (stage_3 or "
        "fsdp); with _offload masters and moments are in the host's memory; auto: stage_2",
        "auto", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload",
        "deepspeed_stage_3", "deepspeed_stage_3_offload", "zero1", "zero2", "zero2_offload",
        "fsdp", "fsdp_offload")
    mesh: str = _option(
        "", "machine", "data=D,fsdp=F: the state is sharded over F devices, D times; default: over "
        "all of them")
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            least = field.metadata["least"]
            if choices and value not in choices:
                known = ", ".join(str(choice) for choice in choices if choice != "")
                raise UserError(f"--{field.name} {value}: choose one of {known}")
            if least is not None and not (value >= least and math.isfinite(value)):
                raise UserError(f"--{field.name} {value}: give {least} or more")
        if self.load_model == "0":  # what the official scripts write for none
            object.__setattr__(self, "load_model", "")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise UserError(f"--{name} {getattr(self, name)}: give less than 1")

    def model_config(self) -> ModelConfig:
        """The architecture of a fresh model."""
        size = SIZE_ALIASES.get(self.size, self.size)
        n_layer, n_embd = SIZES[size or "0.1b"]
        return ModelConfig(
            n_layer=self.n_layer or n_layer,
            n_embd=self.n_embd or n_embd,
            vocab_size=self.vocab_size,
            head_size=self.head_size,
            dim_ffn=self.dim_ffn,
            **self._low_rank(size),
        )

    def _low_rank(self, size: str) -> dict[str, int]:
        names = ("dim_w", "dim_a", "dim_v", "dim_g")
        if self.lora_dims == "formula":
            return {}
        if self.lora_dims == "g1":
            if size not in G1_LOW_RANK:
                raise UserError(f"--lora_dims g1 needs --size, one of {', '.join(G1_LOW_RANK)}")
            return dict(zip(names, G1_LOW_RANK[size], strict=True))
        widths = self.lora_dims.split(",")
        if len(widths) != 4 or not all(
            width.strip().isdecimal() and int(width) for width in widths
        ):
            raise UserError(
                f"--lora_dims {self.lora_dims}: give formula, g1, or four widths as in 64,64,32,128"
            )
        return dict(zip(names, map(int, widths), strict=True))


# Options of the official trainer that have no meaning here: why, and the values that agree with
# what is done (None: any). Accepted and said to be without effect; other values are refused.
WITHOUT_MEANING: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "my_testing": ("every model here is x070", ("x070",)),
    "MODEL_TYPE": ("every model here is x070", ("x070",)),
    "dim_att": ("in x070 it equals n_embd", None),  # compared with it in parse_train_options
    "data_type": ("a .jsonl is known by its name, anything else is binidx", ("binidx", "jsonl")),
    "ds_bucket_mb": ("XLA sizes and schedules the communication itself", None),
    "kernel": ("the WKV kernel follows the device and the precision", None),
    "epoch_steps": ("a miniepoch is 40320 samples, there as here", None),
}


def parse_train_options(arguments: list[str]) -> tuple[TrainConfig, list[str]]:
    """The command line as a `TrainConfig`, and one line for each option that means nothing here."""
    parser = CommandParser(
        prog="python -m rwkv_jax.train",
        usage="%(prog)s [--size 0.1b] [--data_file X.jsonl] [--option value …]",
        description="Pretrain an RWKV-7 model, or go on with one. Without options: the 0.1b model "
        "on the demo text. A run that was stopped goes on by the same command.",
        epilog="Also accepted, without effect: "
        + ", ".join(f"--{name} ({reason})" for name, (reason, _) in WITHOUT_MEANING.items()),
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        default = "" if field.default in ("", -1, 0, 0.0) else f" (default {field.default})"
        choices = [str(choice) for choice in field.metadata["choices"] or () if choice != ""]
        groups[group].add_argument(
            f"--{field.name}",
            type=_number_or_auto if field.name == "micro_bsz" else type(field.default),
            default=field.default,
            metavar="|".join(choices) or type(field.default).__name__.upper(),
            help=(field.metadata["help"] + default).replace("%", "%%"),
        )
    for name in WITHOUT_MEANING:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    given = {name: options.pop(name) for name in WITHOUT_MEANING}
    config = TrainConfig(**options)
    ignored = []
    for name, (reason, agreeing) in WITHOUT_MEANING.items():
        if given[name] is None:
            continue
        if agreeing is not None and given[name] not in agreeing:
            raise UserError(
                f"--{name} {given[name]}: {reason}; give {agreeing[0]}, or leave it out"
            )
        ignored.append(f"--{name} has no effect: {reason}")
    if given["dim_att"] not in (None, "0") and not config.load_model:
        n_embd = config.model_config().n_embd
        if given["dim_att"] != str(n_embd):
            raise UserError(f"--dim_att {given['dim_att']}: x070 needs n_embd, {n_embd}")
    return config, ignored
