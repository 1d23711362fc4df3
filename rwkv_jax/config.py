"""Model and training options, and the command line generated from them.

`TrainConfig`'s fields are the options of `python -m rwkv_jax.train`: name, type, default and help
text are declared in one place. The names are the official trainer's.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from rwkv_jax.errors import CommandParser, UserError, path_argument, whole_number
from rwkv_jax.official_options import OFFICIAL_OPTIONS, OFFICIAL_VALUES, device_count


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of an RWKV-7 (x070) model: everything needed to build its tensors.

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


HEAD_SIZES = (16, 32, 64, 128)  # that the WKV operation supports

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

# What is sharded over the devices; defined by sharding.STRATEGIES.
STRATEGY_NAMES = (
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3",
    "deepspeed_stage_3_offload",
)
STRATEGY_ALIASES = {
    "zero1": "deepspeed_stage_1",
    "zero2": "deepspeed_stage_2",
    "zero2_offload": "deepspeed_stage_2_offload",
    "fsdp": "deepspeed_stage_3",
    "fsdp_offload": "deepspeed_stage_3_offload",
}

AUTO = -1  # the value of `--micro_bsz auto`


def _number_or_auto(text: str) -> int:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")
    return AUTO if text == "auto" else whole_number(text)


def _switch(text: str) -> int:
    """Parses 0 or 1, also as Lightning writes them."""
    return whole_number({"false": "0", "true": "1"}.get(text.lower(), text))


def _deterministic(text: str) -> int:
    return 1 if text.lower() == "warn" else _switch(text)


def _among(choices: tuple[Any, ...]) -> Callable[[str], str]:
    """Parses a choice, ignoring case; any other word is returned unchanged."""
    return lambda text: next((name for name in choices if name.lower() == text.lower()), text)


def _path_or_none(text: str) -> str:
    return text and path_argument(text)


def _option(
    default: Any,
    group: str,
    metavar: str,
    text: str,
    *choices: Any,
    least: float | None = None,
    parse: Any = None,
) -> Any:
    """A field of `TrainConfig` that becomes `--name`.

    Args:
        metavar: one word for the value; empty: the choices.
        least: the smallest allowed value.
        parse: parses the value; None: by the choices, or by the type of the default.
    """
    if parse is None and choices and isinstance(default, str):
        parse = _among(choices)
    elif parse is None and choices == (0, 1):
        parse = _switch
    elif parse is None:
        parse = whole_number if isinstance(default, int) else type(default)
    metadata = {
        "group": group,
        "metavar": metavar or "|".join(str(choice) for choice in choices if choice != ""),
        "help": text,
        "choices": choices or None,
        "least": least,
        "parse": parse,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The options of `python -m rwkv_jax.train`, with the groups and texts of its `--help`."""

    # fmt: off
    size: str = _option(
        "", "model", "", "Sets n_layer and n_embd (default 0.1b).", "", *SIZES, *SIZE_ALIASES)
    n_layer: int = _option(0, "model", "LAYERS", "Number of layers, L; overrides --size.", least=0)
    n_embd: int = _option(0, "model", "WIDTH", "Width, C; overrides --size.", least=0)
    vocab_size: int | None = _option(
        None, "model", "ROWS", "Rows of embedding and head, V (default 65536).", least=2,
        parse=whole_number)
    head_size: int | None = _option(
        None, "model", "", "Width of a head, N (default 64).", *HEAD_SIZES, parse=whole_number)
    dim_ffn: int = _option(
        0, "model", "WIDTH", "Inner width of the channel mix; 0: 4·n_embd.", least=0)
    lora_dims: str = _option(
        "formula", "model", "formula|g1|W,A,V,G", "Low-rank widths of a fresh model: those of the "
        "official formula, of the released G1 model of this --size, or four numbers.")
    load_model: str = _option(
        "", "model", "PATH", "Initial weights; the model takes its shape from them: a .pth, the "
        "output folder of a run, or one of its checkpoints. 0 or empty: those of proj_dir.",
        parse=_path_or_none)
    load_partial: int = _option(
        0, "model", "", "1: tensors that the file lacks are freshly initialised and listed; a "
        "tensor of another shape is refused.", 0, 1)
    random_seed: int = _option(
        0, "model", "SEED", "Seed of fresh initial weights; -1: another seed each time.", least=-1)

    data_file: str = _option(
        "", "data", "PATH", 'Text: X.jsonl (or .jsonl.gz, .jsonl.zst) with a "text" in each line, '
        "X.txt, X.parquet, a folder of them, or a quoted pattern. Or X, for the tokens X.bin and "
        "X.idx (default: the checkout's data/demo.jsonl).",
        parse=_path_or_none)
    text_key: str = _option(
        "text", "data", "KEY", "Key of a .jsonl, or column of a .parquet, with the text.")
    on_bad_line: str = _option(
        "stop", "data", "", "What to do with a line that cannot be used: stop with an error that "
        "names it, or skip it; skipped lines are counted, and listed in proj_dir/skipped.tsv.",
        "stop", "skip")
    ctx_len: int = _option(512, "data", "TOKENS", "Length of a sample, T.", least=1)
    my_exit_tokens: int = _option(
        0, "data", "TOKENS", "Train on this many tokens, then write rwkv-final.pth; 0: the number "
        "of tokens in the data.", least=0)
    magic_prime: int = _option(
        0, "data", "PRIME", "The sampler's prime for this data and ctx_len; 0: computed. A given "
        "one is checked.", least=0)

    micro_bsz: int = _option(
        0, "training", "SAMPLES|auto", "Samples that a device processes at once; 0: 1 on a CPU, 8 "
        "on a GPU; auto: as many as fit the device's memory (takes a few compilations).",
        least=AUTO, parse=_number_or_auto)
    accumulate_grad_batches: int = _option(
        1, "training", "BATCHES", "Gradient accumulation: micro batches whose gradients are "
        "averaged into one step.", least=1)
    lr_init: float | None = _option(
        None, "training", "RATE", "Peak learning rate (default 0.45/n_embd).", parse=float)
    lr_final: float | None = _option(
        None, "training", "RATE", "Final learning rate, at most lr_init (default "
        "lr_init·0.04/0.45).", least=0, parse=float)
    warmup_steps: int = _option(
        10, "training", "STEPS", "Steps of linear warm-up from 1%; -1: 10 if the last "
        "rwkv-{n}.pth is continued, else none.", least=-1)
    beta1: float = _option(0.9, "training", "DECAY", "Adam's β₁.", least=0)
    beta2: float = _option(0.99, "training", "DECAY", "Adam's β₂.", least=0)
    adam_eps: float = _option(
        1e-18, "training", "EPSILON", "Adam's ε, outside the root.", least=0)
    weight_decay: float = _option(
        0.001, "training", "FACTOR", "Decoupled weight decay of the matrices.", least=0)
    grad_clip: float = _option(
        1.0, "training", "NORM", "Largest global norm of the gradient; 0: no limit.", least=0)
    grad_cp: int = _option(
        -1, "training", "", "1: recompute each block in the backward pass to save memory; 2: "
        "recompute all but the matrix products; 0: recompute nothing; -1: 0 on a CPU, 1 on a GPU.",
        -1, 0, 1, 2)
    head_chunk: int = _option(
        0, "training", "TOKENS", "Number of tokens whose logits exist at once, out of a device's "
        "micro_bsz·ctx_len; 0: automatic.", least=0)
    precision: str = _option(
        "auto", "training", "", "Precision of the forward and backward pass (master weights and "
        "Adam are float32); auto: fp32 on a CPU, bf16 on a GPU, fp16 with a loss scale on one "
        "older than Ampere.",
        "auto", "bf16", "fp32", "tf32", "fp16")
    epoch_count: int = _option(
        0, "training", "MINIEPOCHS", "Stop after this many miniepochs of 40320 samples, even "
        "before my_exit_tokens; 0: no limit.", least=0)
    epoch_begin: int = _option(
        0, "training", "MINIEPOCH", "First miniepoch, if the run starts from weights without a "
        "checkpoint.", least=0)
    train_stage: int = _option(
        3, "training", "", "1: write rwkv-init.pth and stop; 2, 3: train, and in a folder without "
        "checkpoints continue from its last rwkv-{n}.pth; 0: train without looking for such files. "
        "No stage overwrites finished weights.",
        0, 1, 2, 3)

    proj_dir: str = _option(
        "out", "output", "FOLDER", "Folder for the .pth files, checkpoints and logs.",
        parse=path_argument)
    epoch_save: int = _option(
        10, "output", "MINIEPOCHS", "Write rwkv-{n}.pth and a checkpoint every N miniepochs, "
        "starting with the first, and after the last whole one; 0: only after the last.", least=0)
    save_every_steps: int = _option(
        0, "output", "STEPS", "Also write a checkpoint every N steps; 0: never.", least=0)
    save_every_minutes: float = _option(
        30.0, "output", "MINUTES", "Also write a checkpoint every N minutes; 0: never.", least=0)
    keep_last: int = _option(
        2, "output", "CHECKPOINTS", "Number of checkpoints to keep.", least=1)
    max_minutes: float = _option(
        0.0, "output", "MINUTES", "Save and stop after N minutes, for jobs with a time limit "
        "(leave time for the save); 0: no limit.", least=0)
    resume_anyway: int = _option(
        0, "output", "", "1: resume even if the data, ctx_len, the batch or the run's starting "
        "point has changed, at the same number of tokens.", 0, 1)
    plot: int = _option(
        0, "output", "", "1: plot the loss during training in proj_dir/loss.html and loss.png.",
        0, 1)
    wandb: str = _option(
        "", "output", "PROJECT", "Weights & Biases project to log to; empty: none.")
    tensorboard: int = _option(
        0, "output", "", "1: write TensorBoard event files to proj_dir/tensorboard.", 0, 1)
    enable_progress_bar: str = _option(
        "auto", "output", "", "auto: a bar on a terminal, lines in a file.",
        "auto", "True", "False")

    accelerator: str = _option(
        "auto", "machine", "", "Type of device; cuda means gpu.", "auto", "gpu", "cuda", "cpu")
    devices: int = _option(
        0, "machine", "NUMBER|auto", "Number of devices on each machine; 0, -1 or auto: all.",
        least=-1, parse=device_count)
    num_nodes: int = _option(
        1, "machine", "MACHINES", "Number of machines that train together; all run the same "
        "command (docs/many-gpus.md).", least=1)
    deterministic: int = _option(
        0, "machine", "", "1: every run produces the same bytes on a GPU, at some cost in time and "
        "memory; on a CPU this is always so.", 0, 1, parse=_deterministic)
    coordinator_address: str = _option(
        "", "machine", "HOST:PORT", "Address of the first machine, if SLURM, Open MPI, Kubernetes "
        "or torchrun does not provide it.")
    process_id: int = _option(
        -1, "machine", "NUMBER", "Number of this machine, from 0; with --coordinator_address.",
        least=-1)
    strategy: str = _option(
        "auto", "machine", "NAME", "What to shard over the devices: master weights and Adam's "
        "moments (deepspeed_stage_1 or zero1), also gradients (deepspeed_stage_2 or zero2), also "
        "parameters (deepspeed_stage_3 or fsdp). With _offload (for stage 2 and 3, zero2 and "
        "fsdp), master weights and moments are in host memory. auto: deepspeed_stage_2.",
        "auto", *STRATEGY_NAMES, *STRATEGY_ALIASES)
    mesh: str = _option(
        "", "machine", "data=D,fsdp=F", "Shard the state over F devices, in D copies (default: "
        "over all devices).")
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            least = field.metadata["least"]
            if choices and value is not None and value not in choices:
                known = ", ".join(str(choice) for choice in choices if choice != "")
                raise UserError(f"--{field.name} {value}: choose one of {known}")
            if least is not None and value is not None:
                if not (value >= least and math.isfinite(value)):
                    omit = ", or leave it out" if field.default is None else ""
                    raise UserError(f"--{field.name} {value}: give {least} or more{omit}")
        same: dict[str, dict[Any, Any]] = {
            "load_model": {"0": ""},
            "accelerator": {"cuda": "gpu"},
            "devices": {-1: 0},
        }
        for name, values in same.items():  # the official scripts write "0" for none
            value = getattr(self, name)
            object.__setattr__(self, name, values.get(value, value))
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise UserError(f"--{name} {getattr(self, name)}: give less than 1")
        if self.lr_init is not None:
            if not (self.lr_init > 0 and math.isfinite(self.lr_init)):
                raise UserError(f"--lr_init {self.lr_init}: give more than 0")
            self.learning_rates(0)
        if self.train_stage == 1 and self.load_model:
            raise UserError(
                f"--train_stage 1 --load_model {self.load_model}: stage 1 only writes fresh "
                "weights; leave out --train_stage to train from that file, with --load_partial 1 "
                "if it lacks tensors"
            )

    def learning_rates(self, n_embd: int) -> tuple[float, float]:
        """Peak and final learning rate for a model of this width: 0.45/C, and 0.04/0.45 of it.

        Raises:
            UserError: the rate would rise.
        """
        init = 0.45 / n_embd if self.lr_init is None else self.lr_init
        final = init * 0.04 / 0.45 if self.lr_final is None else self.lr_final
        if final > init:
            raise UserError(
                f"--lr_final {final:g} is above --lr_init {init:g}, so that the learning rate "
                "would rise: give a smaller value, or leave it out for lr_init·0.04/0.45"
            )
        return init, final

    def model_config(self) -> ModelConfig:
        """The architecture of a fresh model."""
        size = SIZE_ALIASES.get(self.size, self.size)
        n_layer, n_embd = SIZES[size or "0.1b"]
        return ModelConfig(
            n_layer=self.n_layer or n_layer,
            n_embd=self.n_embd or n_embd,
            vocab_size=self.vocab_size or ModelConfig.vocab_size,
            head_size=self.head_size or ModelConfig.head_size,
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


def parse_train_options(arguments: list[str]) -> tuple[TrainConfig, list[str]]:
    """Parses the command line.

    Returns:
        The options, and at most two notes about official options: those that were replaced, and
        those without effect.

    Raises:
        UserError: an option or a value cannot be used.
    """
    options = vars(_parser().parse_args(arguments))
    official = {name: options.pop(name) for name in OFFICIAL_OPTIONS if name in options}
    notes = {
        "replaced here": _renamed(official, options),
        "without effect here": _without_effect(official),
    }
    config = TrainConfig(**options)
    width = official.get("dim_att", "0")
    if width != "0" and not config.load_model:
        n_embd = config.model_config().n_embd
        if width != str(n_embd):
            raise UserError(f"--dim_att {width}: x070 needs n_embd, {n_embd}")
    return config, [f"{text}: {'; '.join(each)}" for text, each in notes.items() if each]


def _parser() -> CommandParser:
    parser = CommandParser(
        usage="%(prog)s [--size 0.1b] [--data_file X.jsonl] [--option value …]",
        description="Pretrain an RWKV-7 model, or continue training one. Without options: the 0.1b "
        "model on the demo text. A run that was stopped is resumed by the same command.",
        epilog="Other options of the official trainers and of Lightning's Trainer are recognised; "
        "docs/options.md lists them.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name, field in fields.items():
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        default = field.default
        suffix = "" if default in ("", -1, 0, 0.0, None) else f" (default {default})"
        choices = field.metadata["choices"] or ()
        # An option without a value is on, as in Lightning.
        on = {"const": "True"} if "True" in choices else {"const": 1} if choices == (0, 1) else {}
        groups[group].add_argument(
            f"--{name}",
            type=field.metadata["parse"],
            metavar=field.metadata["metavar"],
            help=(field.metadata["help"].removesuffix(".") + suffix + ".").replace("%", "%%"),
            **({"nargs": "?", **on} if on else {}),
        )
    for name, option in OFFICIAL_OPTIONS.items():
        if option.becomes:
            parse = option.parse or fields[option.becomes].metadata["parse"]
            parser.add_argument(f"--{name}", dest=name, type=parse, help=argparse.SUPPRESS)
        else:  # Lightning also accepts these without a value
            parser.add_argument(
                f"--{name}", dest=name, nargs="?", const="True", help=argparse.SUPPRESS
            )
    return parser


def _renamed(official: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """Moves values given under an official name to our option; returns a note for each."""
    notes = []
    for name, value in official.items():
        option = OFFICIAL_OPTIONS[name]
        ours = option.becomes
        if not ours:
            continue
        if option.agreeing is not None and str(value) not in option.agreeing:
            raise _refused(name, value)
        if options.setdefault(ours, value) != value:
            raise UserError(
                f"--{name} {value} and --{ours} {options[ours]}: two names of one option; give one"
            )
        notes.append(f"--{name} (by --{ours} {value})")
    for name, value in options.items():
        if our_value := OFFICIAL_VALUES.get((name, str(value).lower())):
            options[name] = our_value
            notes.append(f"--{name} {value} (by {our_value})")
    return notes


def _without_effect(official: dict[str, Any]) -> list[str]:
    """Notes about options without effect, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for name, value in official.items():
        option = OFFICIAL_OPTIONS[name]
        if option.becomes:
            continue
        if option.agreeing is not None:
            if value.lower() not in (agreeing.lower() for agreeing in option.agreeing):
                raise _refused(name, value)
        reasons.setdefault(option.reason, []).append(f"--{name}")
    return [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]


def _refused(name: str, value: Any) -> UserError:
    option = OFFICIAL_OPTIONS[name]
    agreeing = (option.agreeing or ("",))[0]
    return UserError(f"--{name} {value}: {option.reason}; give {agreeing}, or leave it out")
