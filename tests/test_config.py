"""The command line: every option of the official trainer, and one line for what is wrong."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_jax.config import (
    G1_LOW_RANK,
    SIZES,
    WITHOUT_MEANING,
    TrainConfig,
    default_low_rank,
    parse_train_options,
)
from rwkv_jax.errors import UserError

ROOT = Path(__file__).parent.parent

# Every option of the official trainer's code and of its tutorial's table, as its demo sets it
# (where the demo leaves it out: a value that it allows).
OFFICIAL = {
    "my_testing": "x070",
    "MODEL_TYPE": "x070",
    "kernel": "@rwkv3",
    "epoch_steps": "1000",
    "n_layer": "12",
    "n_embd": "768",
    "ctx_len": "512",
    "data_file": "data/minipile",
    "my_exit_tokens": "1498226207",
    "magic_prime": "2926181",
    "proj_dir": "out/L12-D768-x070",
    "micro_bsz": "16",
    "lr_init": "6e-4",
    "lr_final": "6e-5",
    "grad_cp": "1",
    "epoch_save": "10",
    "num_nodes": "1",
    "devices": "1",
    "ds_bucket_mb": "200",
    "load_model": "0",
    "wandb": "",
    "train_stage": "3",
    "epoch_count": "999999",
    "epoch_begin": "0",
    "warmup_steps": "10",
    "beta1": "0.9",
    "beta2": "0.99",
    "adam_eps": "1e-18",
    "data_type": "binidx",
    "vocab_size": "65536",
    "weight_decay": "0.001",
    "head_size": "64",
    "accelerator": "gpu",
    "precision": "bf16",
    "strategy": "deepspeed_stage_2",
    "enable_progress_bar": "True",
    "random_seed": "1",
    "dim_att": "768",
    "dim_ffn": "3072",
    "grad_clip": "1.0",
    "head_chunk": "0",
    "load_partial": "0",
}
MEANINGLESS = {
    *("my_testing", "MODEL_TYPE", "ds_bucket_mb", "data_type", "dim_att"),
    *("kernel", "epoch_steps"),
}


def options(values: dict[str, str]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def message(*arguments: str) -> str:
    """What is said to a person who types this."""
    with pytest.raises(UserError) as caught:
        parse_train_options(list(arguments))[0].model_config()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_option_is_accepted(name):
    config, ignored = parse_train_options(options({name: OFFICIAL[name]}))
    if name in MEANINGLESS:
        [line] = ignored
        assert line.startswith(f"--{name} has no effect: ")
        assert config == TrainConfig()
    else:
        assert ignored == []
        expected = "" if name == "load_model" else OFFICIAL[name]  # "0" is their word for none
        assert getattr(config, name) == type(getattr(config, name))(expected)


def test_all_official_options_at_once():
    config, ignored = parse_train_options(options(OFFICIAL))
    assert len(ignored) == len(MEANINGLESS)
    assert (config.lr_init, config.adam_eps, config.beta2) == (6e-4, 1e-18, 0.99)
    assert (config.my_exit_tokens, config.magic_prime) == (1498226207, 2926181)
    model = config.model_config()
    assert (model.n_layer, model.n_embd, model.n_head, model.dim_ffn) == (12, 768, 12, 3072)


# demo-training-run.sh and demo-training-prepare.sh of RWKV-LM (RWKV-v7/train_temp, 2025-11), word
# for word, with their variables filled in.
OFFICIAL_RUN = """\
--load_model "0" --wandb "Test" --proj_dir out/L12-D768-x070 --my_testing x070 \\
 --ctx_len 512 --train_stage 3 --epoch_count 999999 --epoch_begin 0 \\
 --data_file "data/minipile" --my_exit_tokens 1498226207 --magic_prime 2926181 \\
 --num_nodes 1 --micro_bsz 16 --n_layer 12 --n_embd 768 --kernel @rwkv3 \\
 --lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --data_type "binidx" --vocab_size 65536 \\
 --weight_decay 0.001 --epoch_save 10 --head_size 64 --head_chunk 0 \\
 --accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1 --enable_progress_bar True #--ds_bucket_mb 2
"""  # noqa: E501
OFFICIAL_PREPARE = """\
--wandb "" --proj_dir out/L12-D768-x070 \\
 --data_file "data/minipile" --data_type "binidx" --vocab_size 65536 --my_testing x070 \\
 --ctx_len 512 --train_stage 1 --epoch_count 1 --epoch_begin 0 \\
 --epoch_save 1 --weight_decay 0 --head_size 64 \\
 --num_nodes 1 --micro_bsz 1 --n_layer 12 --n_embd 768 --my_exit_tokens 1498226207 --magic_prime 2926181 \\
 --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 \\
 --accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1
"""  # noqa: E501


@pytest.mark.parametrize("text", [OFFICIAL_RUN, OFFICIAL_PREPARE], ids=["run", "prepare"])
def test_the_official_scripts_are_accepted_word_for_word(text):
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    config, ignored = parse_train_options(words)
    given = {
        name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)
    }
    for name, value in given.items():
        if name in MEANINGLESS:
            assert any(line.startswith(f"--{name} has no effect: ") for line in ignored), name
        elif name != "load_model":
            assert getattr(config, name) == type(getattr(config, name))(value), name
    assert len(ignored) == len(MEANINGLESS & set(given))
    assert config.load_model == "" and config.model_config().n_layer == 12


def test_the_readme_has_the_official_command():
    """All but the wandb project, which would ask for an account."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"as it is:\n\n```sh\npython -m rwkv_jax\.train (.*?)\n```", text, re.S)[1]
    ours, official = (
        shlex.split(part.replace("\\\n", " "), comments=True) for part in (command, OFFICIAL_RUN)
    )
    assert ours == ["" if word == "Test" else word for word in official]


def test_what_other_official_values_mean():
    for name, value, meant in (
        ("random_seed", "-1", -1),
        ("warmup_steps", "-1", -1),
        ("train_stage", "0", 0),
        ("devices", "-1", 0),
        ("devices", "auto", 0),
        ("accelerator", "cuda", "gpu"),
    ):
        config, ignored = parse_train_options([f"--{name}", value])
        assert getattr(config, name) == meant and ignored == []


def test_learning_rates():
    """Left out, lr_final keeps its ratio to lr_init; 0 is 0; a rate that would rise is refused."""

    def rates(*arguments: str) -> tuple[float, float]:
        return parse_train_options(list(arguments))[0].learning_rates(768)

    assert rates() == pytest.approx((0.45 / 768, 0.04 / 768))
    assert rates("--lr_init", "1e-5") == pytest.approx((1e-5, 1e-5 * 0.04 / 0.45))
    assert rates("--lr_final", "0") == (0.45 / 768, 0.0)
    assert rates("--lr_init", "1e-5", "--lr_final", "1e-5") == (1e-5, 1e-5)
    with pytest.raises(UserError, match="--lr_final 0.001 is above --lr_init 0.000585"):
        rates("--lr_final", "1e-3")


def test_without_options_everything_is_official():
    config, ignored = parse_train_options([])
    assert ignored == []
    assert (config.beta1, config.beta2, config.adam_eps) == (0.9, 0.99, 1e-18)
    assert (config.weight_decay, config.grad_clip, config.warmup_steps) == (0.001, 1.0, 10)
    assert config.epoch_save == 10
    assert (config.vocab_size, config.head_size) == (65536, 64)
    assert (config.model_config().n_layer, config.model_config().n_embd) == (12, 768)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--size", "7b"], ["7b", "7.2b"]),
        (["--lr_initt", "1"], ["--lr_initt", "--lr_init"]),
        (["--ctx", "512"], ["--ctx"]),  # no abbreviations: they change meaning as options come
        (["--ctx_len", "0"], ["--ctx_len 0", "1 or more"]),
        (["--ctx_len", "many"], ["--ctx_len", "many"]),
        (["--ctx_len"], ["--ctx_len"]),
        (["--micro_bsz", "-1"], ["--micro_bsz", "-1"]),
        (["--lr_init", "-0.001"], ["--lr_init -0.001"]),
        (["--lr_init", "nan"], ["--lr_init nan"]),
        (["--beta2", "1"], ["--beta2 1.0", "less than 1"]),
        (["--lr_init", "0"], ["--lr_init 0", "more than 0"]),
        (["--lr_init", "1e-5", "--lr_final", "1e-4"], ["--lr_final 0.0001", "--lr_init 1e-05"]),
        (["--warmup_steps", "-2"], ["--warmup_steps -2"]),
        (["--random_seed", "-2"], ["--random_seed -2"]),
        (["--devices", "0,1"], ["--devices", "0,1"]),
        (["--accelerator", "tpu"], ["--accelerator tpu", "gpu"]),
        (["--train_stage", "1", "--load_model", "x.pth"], ["--load_model x.pth", "leave"]),
        (["--head_size", "48"], ["--head_size 48", "64"]),
        (["--my_testing", "x060"], ["--my_testing x060", "x070"]),
        (["--dim_att", "512"], ["--dim_att 512", "768"]),
        (["--data_type", "numpy"], ["--data_type numpy", "binidx"]),
        (["--data_type", "utf-8"], ["--data_type utf-8", "jsonl", "leave it out"]),
        (["--n_embd", "100"], ["--n_embd 100", "--head_size 64", "128"]),
        (["--n_embd", "1"], ["--n_embd 1 ", "try 64"]),
        (["--precision", "fp8"], ["fp8", "bf16"]),
        (["--strategy", "ddp"], ["ddp", "deepspeed_stage_2"]),
        (["--train_stage", "4"], ["--train_stage 4"]),
        (["--grad_cp", "3"], ["--grad_cp 3"]),
        (["--lora_dims", "g2"], ["--lora_dims g2", "g1"]),
        (["--lora_dims", "64,64,32"], ["--lora_dims 64,64,32", "four"]),
        (["--lora_dims", "64,64,32,0"], ["--lora_dims 64,64,32,0"]),
        (["--lora_dims", "g1"], ["--lora_dims g1", "--size"]),
        (["--lora_dims", "g1", "--size", "tiny"], ["--lora_dims g1", "--size"]),
        (["stray"], ["stray"]),
    ],
    ids=" ".join,
)
def test_wrong_command_lines_get_one_line(arguments, named):
    text = message(*arguments)
    assert all(word in text for word in named), text


def test_a_wrong_command_line_is_one_line_on_stderr():
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_jax.train", "--ctx_lenn", "512"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and "--ctx_len?" in line


@pytest.mark.parametrize(
    ("size", "n_layer", "n_embd"),
    [
        ("0.1b", 12, 768), ("0.4b", 24, 1024), ("1.5b", 24, 2048), ("2.9b", 32, 2560),
        ("3b", 32, 2560), ("7.2b", 32, 4096), ("13.3b", 61, 4096),
    ],
)  # fmt: skip
def test_sizes(size, n_layer, n_embd):
    model = TrainConfig(size=size).model_config()
    assert (model.n_layer, model.n_embd) == (n_layer, n_embd)
    wider = TrainConfig(size=size, n_layer=3, n_embd=128).model_config()
    assert (wider.n_layer, wider.n_embd) == (3, 128)


# Published G1 widths (w, a, v, g); the formula's, computed by hand from max(32, round(f·√C/32)·32).
G1 = {
    "0.1b": (64, 64, 32, 128), "0.4b": (64, 64, 32, 128), "1.5b": (96, 96, 64, 256),
    "2.9b": (96, 96, 64, 320), "7.2b": (128, 128, 96, 480), "13.3b": (192, 192, 128, 384),
}  # fmt: skip
FORMULA = {
    64: (32, 32, 32, 32), 768: (64, 64, 32, 128), 1024: (64, 64, 64, 160),
    2048: (128, 128, 64, 224), 2560: (128, 128, 96, 256), 4096: (160, 160, 96, 320),
}  # fmt: skip


def widths(**given: str | int) -> tuple[int, int, int, int]:
    model = TrainConfig(**given).model_config()
    return model.dim_w, model.dim_a, model.dim_v, model.dim_g


@pytest.mark.parametrize("size", G1)
def test_lora_dims_of_g1(size):
    assert widths(size=size, lora_dims="g1") == G1[size]
    assert set(G1_LOW_RANK) == set(G1) == set(SIZES) - {"tiny"}


@pytest.mark.parametrize("n_embd", FORMULA)
def test_lora_dims_of_the_formula(n_embd):
    assert widths(n_embd=n_embd) == FORMULA[n_embd]
    assert tuple(default_low_rank(n_embd).values()) == FORMULA[n_embd]


def test_lora_dims_as_a_list_and_of_an_alias():
    assert widths(n_embd=768, lora_dims="16, 32,48,64") == (16, 32, 48, 64)
    assert widths(size="3b", lora_dims="g1") == G1["2.9b"]


def test_tables_and_help_name_every_option(capsys):
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["metavar"] and field.metadata["help"].endswith("."), field.name
    for page in ("docs/options.md", "docs/zh-CN/options.md"):
        rows = re.findall(r"^\| (`--.*?) \|", (ROOT / page).read_text("utf-8"), re.M)
        assert set(re.findall(r"--(\w+)", " ".join(rows))) == fields | set(WITHOUT_MEANING), page

    with pytest.raises(SystemExit) as caught:
        parse_train_options(["--help"])
    assert caught.value.code == 0
    assert fields | set(WITHOUT_MEANING) <= set(re.findall(r"--(\w+)", capsys.readouterr().out))


def test_every_option_is_official_or_ours():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    ours = {
        "size",
        "lora_dims",
        "accumulate_grad_batches",
        "save_every_steps",
        "save_every_minutes",
        "keep_last",
        "max_minutes",
        "resume_anyway",
        "tensorboard",
        "plot",
        "coordinator_address",
        "process_id",
        "mesh",
    }
    assert fields | MEANINGLESS == set(OFFICIAL) | ours
