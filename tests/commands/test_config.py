"""The command line: every option of the official trainer, and one line for what is wrong."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import rwkv_jax
from rwkv_jax.config import G1_LOW_RANK, SIZES, TrainConfig, default_low_rank, parse_train_options
from rwkv_jax.errors import UserError
from rwkv_jax.official_options import OFFICIAL_OPTIONS

ROOT = Path(__file__).parents[2]

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
        assert line.startswith(f"without effect here: --{name} (")
        assert config == TrainConfig()
    else:
        assert ignored == []
        expected = "" if name == "load_model" else OFFICIAL[name]  # "0" is their word for none
        assert getattr(config, name) == type(getattr(config, name))(expected)


def test_all_official_options_at_once():
    config, [line] = parse_train_options(options(OFFICIAL))
    assert (
        line.startswith("without effect here: ")
        and set(re.findall(r"--(\w+)", line)) == MEANINGLESS
    )
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


# The same two of RWKV-v5, which train RWKV-7 by its earlier options.
OFFICIAL_V5_RUN = """\
--load_model "0" --wandb "Test" --proj_dir out/L12-D768-x070 --my_testing x070 \\
 --ctx_len 512 --my_pile_stage 3 --epoch_count 999999 --epoch_begin 0 \\
 --data_file "data/minipile" --my_exit_tokens 1498226207 --magic_prime 2926181 \\
 --num_nodes 1 --micro_bsz 16 --n_layer 12 --n_embd 768 --pre_ffn 0 --head_qk 0 \\
 --lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --my_pile_edecay 0 --data_type "binidx" --vocab_size 65536 \\
 --weight_decay 0.001 --epoch_save 10 --head_size_a 64 \\
 --accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1 --enable_progress_bar True --ds_bucket_mb 2
"""  # noqa: E501
OFFICIAL_V5_PREPARE = """\
--wandb "" --proj_dir out/L12-D768-x070 \\
 --data_file "data/minipile" --data_type "binidx" --vocab_size 65536 --my_testing x070 \\
 --ctx_len 512 --my_pile_stage 1 --epoch_count 1 --epoch_begin 0 \\
 --epoch_save 1 --weight_decay 0 --head_size_a 64 \\
 --num_nodes 1 --micro_bsz 1 --n_layer 12 --n_embd 768 --pre_ffn 0 --head_qk 0 --my_exit_tokens 1498226207 --magic_prime 2926181 \\
 --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --my_pile_edecay 0 \\
 --accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1
"""  # noqa: E501


@pytest.mark.parametrize(
    "text",
    [OFFICIAL_RUN, OFFICIAL_PREPARE, OFFICIAL_V5_RUN, OFFICIAL_V5_PREPARE],
    ids=["run", "prepare", "v5 run", "v5 prepare"],
)
def test_the_official_scripts_are_accepted_word_for_word(text):
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    config, notes = parse_train_options(words)
    given = {
        name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)
    }
    names = {"my_pile_stage": "train_stage", "head_size_a": "head_size"}
    without_effect = set()
    for name, value in given.items():
        if hasattr(config, names.get(name, name)):
            ours = getattr(config, names.get(name, name))
            assert name == "load_model" or ours == type(ours)(value), name
        else:
            without_effect.add(name)
    assert without_effect == {
        name for name in re.findall(r"--(\w+)", notes[-1]) if name in OFFICIAL_OPTIONS
    }
    replaced = [
        f"--{name} (by --{here} {given[name]})" for name, here in names.items() if name in given
    ]
    assert notes[:-1] == ([f"replaced here: {'; '.join(replaced)}"] if replaced else [])
    assert config.load_model == "" and config.model_config().n_layer == 12


def test_the_readme_has_the_official_command():
    """All but the wandb project, which would ask for an account."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"as it is:\n\n```sh\npython -m rwkv_jax\.train (.*?)\n```", text, re.S)[1]
    ours, official = (
        shlex.split(part.replace("\\\n", " "), comments=True) for part in (command, OFFICIAL_RUN)
    )
    assert ours == ["" if word == "Test" else word for word in official]


# What is done with an option of the official trainers, and with a value of it.
# "": without effect; "option=value": what it becomes; None: refused.
OUTCOMES = [
    # RWKV-v4neo and RWKV-v5.
    ("my_pile_stage", "3", "train_stage=3"), ("my_pile_stage", "1", "train_stage=1"),
    ("my_pile_stage", "2", None), ("my_pile_stage", "0", None), ("my_pile_stage", "4", None),
    ("head_size_a", "128", "head_size=128"), ("head_size_divisor", "8", ""),
    ("head_size_divisor", "4", None), ("pre_ffn", "0", ""), ("pre_ffn", "1", None),
    ("head_qk", "0", ""), ("head_qk", "256", None), ("tiny_att_dim", "0", ""),
    ("tiny_att_dim", "512", None), ("tiny_att_layer", "-999", ""), ("my_pos_emb", "0", ""),
    ("my_pos_emb", "1", None), ("dropout", "0", ""), ("dropout", "0.0", ""),
    ("dropout", "0.1", None), ("layerwise_lr", "1", ""), ("layerwise_lr", "0", None),
    ("weight_decay_final", "-1", ""), ("weight_decay_final", "0.01", None),
    ("my_pile_edecay", "0", ""), ("my_pile_edecay", "5", None), ("my_pile_version", "1", ""),
    ("my_pile_version", "2", None), ("my_pile_shift", "-1", ""), ("my_pile_shift", "0", ""),
    ("my_pile_shift", "7", None), ("my_random_steps", "0", ""), ("my_random_steps", "9", None),
    ("my_qa_mask", "0", ""), ("my_qa_mask", "1", None), ("my_exit", "99999999", ""),
    ("my_exit", "3", None), ("train_type", "", ""), ("train_type", "states", None),
    ("my_ffn_shift", "1", ""), ("my_att_shift", "1", ""), ("my_sample_len", "0", ""),
    ("my_img_version", "0", ""), ("my_img_size", "0", ""), ("my_img_bit", "0", ""),
    ("my_img_clip", "x", ""), ("my_img_clip_scale", "1", ""), ("my_img_l1_scale", "0", ""),
    ("my_img_encoder", "x", ""), ("epoch_steps", "1000", ""), ("ds_bucket_mb", "200", ""),
    # pytorch_lightning.Trainer 1.9.5, in the order of its signature.
    ("logger", "False", ""), ("enable_checkpointing", "false", ""), ("callbacks", "None", ""),
    ("callbacks", "mine", None), ("default_root_dir", "out", ""),
    ("gradient_clip_val", "0.5", "grad_clip=0.5"), ("gradient_clip_algorithm", "norm", ""),
    ("gradient_clip_algorithm", "value", None), ("num_nodes", "1", "num_nodes=1"),
    ("num_processes", "1", ""), ("num_processes", "8", None), ("devices", "4", "devices=4"),
    ("devices", "auto", "devices=0"), ("devices", "0,1", None), ("gpus", "8", "devices=8"),
    ("gpus", "-1", "devices=0"), ("gpus", "0,1", None), ("gpus", "0", None),
    ("auto_select_gpus", "True", ""),
    ("tpu_cores", "8", None), ("tpu_cores", "None", ""), ("ipus", "2", None), ("ipus", "0", ""),
    ("enable_progress_bar", "true", "enable_progress_bar=True"),
    ("enable_progress_bar", "FALSE", "enable_progress_bar=False"),
    ("overfit_batches", "0.0", ""), ("overfit_batches", "10", None), ("track_grad_norm", "2", ""),
    ("check_val_every_n_epoch", "1", ""), ("fast_dev_run", "False", ""),
    ("fast_dev_run", "True", None), ("accumulate_grad_batches", "4", "accumulate_grad_batches=4"),
    ("max_epochs", "-1", ""), ("max_epochs", "500", ""), ("min_epochs", "1", ""),
    ("max_steps", "-1", ""), ("max_steps", "1000", None), ("min_steps", "1", ""),
    ("max_time", "01:02:03:30", "max_minutes=1563.5"), ("max_time", "12h", None),
    ("limit_train_batches", "1.0", ""), ("limit_train_batches", "1", None),
    ("limit_val_batches", "0", ""), ("limit_test_batches", "0", ""),
    ("limit_predict_batches", "0", ""), ("val_check_interval", "0.25", ""),
    ("log_every_n_steps", "10", ""), ("accelerator", "GPU", "accelerator=gpu"),
    ("accelerator", "tpu", None), ("strategy", "ddp", "strategy=deepspeed_stage_1"),
    ("strategy", "ddp_find_unused_parameters_false", "strategy=deepspeed_stage_1"),
    ("strategy", "deepspeed", "strategy=deepspeed_stage_2"), ("strategy", "ipu_strategy", None),
    ("sync_batchnorm", "true", ""), ("precision", "32", "precision=fp32"),
    ("precision", "32-true", "precision=fp32"), ("precision", "16", "precision=fp16"),
    ("precision", "16-mixed", "precision=fp16"), ("precision", "bf16-mixed", "precision=bf16"),
    ("precision", "BF16", "precision=bf16"), ("precision", "64", None),
    ("precision", "bf16-true", None), ("enable_model_summary", "False", ""),
    ("num_sanity_val_steps", "0", ""), ("resume_from_checkpoint", "None", ""),
    ("resume_from_checkpoint", "last.ckpt", None), ("profiler", "simple", ""),
    ("benchmark", "True", ""), ("deterministic", "warn", "deterministic=1"),
    ("reload_dataloaders_every_n_epochs", "0", ""), ("auto_lr_find", "False", ""),
    ("replace_sampler_ddp", "False", ""), ("detect_anomaly", "True", ""),
    ("auto_scale_batch_size", "False", ""), ("plugins", "None", ""), ("plugins", "mine", None),
    ("amp_backend", "native", ""), ("amp_level", "O2", ""), ("move_metrics_to_cpu", "False", ""),
    ("multiple_trainloader_mode", "max_size_cycle", ""), ("inference_mode", "True", ""),
    # What the launchers of torch and DeepSpeed add.
    ("local_rank", "0", ""), ("local-rank", "3", ""), ("deepspeed", "True", ""),
    ("deepspeed_config", "ds.json", None),
]  # fmt: skip
# The parameters of Trainer.__init__ in Lightning 1.9.5.
LIGHTNING = """
    logger enable_checkpointing callbacks default_root_dir gradient_clip_val gradient_clip_algorithm
    num_nodes num_processes devices gpus auto_select_gpus tpu_cores ipus enable_progress_bar
    overfit_batches track_grad_norm check_val_every_n_epoch fast_dev_run accumulate_grad_batches
    max_epochs min_epochs max_steps min_steps max_time limit_train_batches limit_val_batches
    limit_test_batches limit_predict_batches val_check_interval log_every_n_steps accelerator
    strategy sync_batchnorm precision enable_model_summary num_sanity_val_steps
    resume_from_checkpoint profiler benchmark deterministic reload_dataloaders_every_n_epochs
    auto_lr_find replace_sampler_ddp detect_anomaly auto_scale_batch_size plugins amp_backend
    amp_level move_metrics_to_cpu multiple_trainloader_mode inference_mode
""".split()


@pytest.mark.parametrize(("name", "value", "outcome"), OUTCOMES)
def test_what_is_done_with_each_official_option(name, value, outcome):
    given = [f"--{name}={value}"]  # so that an empty or negative value is one
    if outcome is None:
        text = message(*given)
        assert f"--{name}" in text and value in text and "did you mean" not in text
        return
    config, notes = parse_train_options(given)
    if outcome:
        ours, _, becomes = outcome.partition("=")
        assert str(getattr(config, ours)) == becomes
        assert dataclasses.replace(config, **{ours: getattr(TrainConfig(), ours)}) == TrainConfig()
        assert (name == ours) or notes[0].startswith(f"replaced here: --{name} (by --{ours} ")
    else:
        [line] = notes
        assert config == TrainConfig() and line.startswith(f"without effect here: --{name} (")


def test_every_option_of_the_official_trainers_and_of_lightning_has_an_outcome():
    known = {name for name, *_ in OUTCOMES}
    assert known >= set(LIGHTNING) and known | MEANINGLESS >= set(OFFICIAL_OPTIONS)


def test_options_without_effect_are_one_line_and_may_lack_a_value():
    _, [line] = parse_train_options(
        "--sync_batchnorm --benchmark --my_testing x070 --MODEL_TYPE x070 --max_epochs 3".split()
    )
    assert line.count("every model here is x070") == 1 and "--my_testing, --MODEL_TYPE (" in line
    assert set(re.findall(r"--(\w+)", line)) > {"sync_batchnorm", "benchmark", "max_epochs"}
    assert parse_train_options(["--enable_progress_bar"])[0].enable_progress_bar == "True"


def test_a_switch_may_lack_its_value():
    config, notes = parse_train_options(["--plot", "--deterministic", "--tensorboard", "false"])
    assert (config.plot, config.deterministic, config.tensorboard, notes) == (1, 1, 0, [])
    assert "--plot 2" in message("--plot", "2") and "warn" in message("--plot", "warn")


def test_two_names_of_one_option_agree_or_are_refused():
    config, _ = parse_train_options(["--head_size_a", "32", "--head_size", "32"])
    assert config.head_size == 32
    text = message("--gradient_clip_val", "0.5", "--grad_clip", "1")
    assert "--gradient_clip_val 0.5 and --grad_clip 1.0" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_train_options(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"rwkv-jax {rwkv_jax.__version__}\n"


def test_what_other_official_values_mean():
    for name, value, meant in (
        ("random_seed", "-1", -1),
        ("warmup_steps", "-1", -1),
        ("train_stage", "0", 0),
        ("devices", "-1", 0),
        ("devices", "auto", 0),
        ("accelerator", "cuda", "gpu"),
        ("my_exit_tokens", "1e6", 1_000_000),
        ("size", "0.1B", "0.1b"),
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
    model = config.model_config()
    assert (model.vocab_size, model.head_size) == (65536, 64)
    assert (config.model_config().n_layer, config.model_config().n_embd) == (12, 768)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--size", "7b"], ["7b", "7.2b"]),
        (["--lr_initt", "1"], ["--lr_initt", "--lr_init"]),
        (["--ctx-len", "64"], ["--ctx-len 64", "did you mean --ctx_len?"]),
        (["--lr", "1e-4"], ["--lr 1e-4", "did you mean --lr_init or --lr_final?"]),
        (["--batch_size", "8"], ["--batch_size 8 (--help"]),  # nothing is near
        (["--data_file", __file__, __file__], [__file__, "the folder or a quoted pattern"]),
        (["--lr_init", "-1e-4"], ["--lr_init -0.0001", "more than 0"]),
        (["--ctx_len", "7.5"], ["--ctx_len", "'7.5' is not a whole number"]),
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
        (["--devices", "[0,1]"], ["--devices", "CUDA_VISIBLE_DEVICES=0,1"]),
        (["--accelerator", "tpu"], ["--accelerator tpu", "gpu"]),
        (["--train_stage", "1", "--load_model", "x.pth"], ["--load_model x.pth", "leave"]),
        (["--head_size", "48"], ["--head_size 48", "64"]),
        (["--vocab_size", "0"], ["--vocab_size 0: give 2 or more, or leave it out"]),
        (["--my_testing", "x060"], ["--my_testing x060", "x070"]),
        (["--dim_att", "512"], ["--dim_att 512", "768"]),
        (["--data_type", "numpy"], ["--data_type numpy", "binidx"]),
        (["--data_type", "utf-8"], ["--data_type utf-8", "binidx", "leave it out"]),
        (["--n_embd", "100"], ["--n_embd 100", "--head_size 64", "128"]),
        (["--n_embd", "1"], ["--n_embd 1 ", "try 64"]),
        (["--precision", "fp8"], ["fp8", "bf16"]),
        (["--strategy", "dp"], ["dp", "deepspeed_stage_2"]),
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
        assert set(re.findall(r"--([\w-]+)", " ".join(rows))) == fields | set(OFFICIAL_OPTIONS), (
            page
        )

    with pytest.raises(SystemExit) as caught:
        parse_train_options(["--help"])
    assert caught.value.code == 0
    assert fields <= set(re.findall(r"--(\w+)", capsys.readouterr().out))


def test_every_option_is_official_or_ours():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    ours = {
        "size",
        "lora_dims",
        "text_key",
        "on_bad_line",
        "accumulate_grad_batches",
        "save_every_steps",
        "save_every_minutes",
        "keep_last",
        "max_minutes",
        "resume_anyway",
        "tensorboard",
        "plot",
        "deterministic",
        "coordinator_address",
        "process_id",
        "mesh",
    }
    assert fields | MEANINGLESS == set(OFFICIAL) | ours
