"""`python -m rwkv_jax.doctor`: each rule on a machine that has the trouble, and the self-test."""

import dataclasses
import re
import sys

import jax
import numpy as np
import pytest

from rwkv_jax import doctor, train
from rwkv_jax.checkpoints import weights
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.device.nvidia import Gpu
from rwkv_jax.diagnosis import facts, rules, self_test
from rwkv_jax.diagnosis.facts import Facts
from rwkv_jax.diagnosis.rules import notes, problems
from rwkv_jax.errors import UserError
from rwkv_jax.text.dataset import open_dataset

H100 = Gpu("NVIDIA H100 80GB HBM3", "580.65.06", 81559, 4, (9, 0))
CUDA13 = {"jax": "0.12.0", "jaxlib": "0.12.0", "jax-cuda13-plugin": "0.12.0"}
CUDA12 = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2"}
HEALTHY = Facts(CUDA13, {}, (H100,), "", "gpu", ("NVIDIA H100 80GB HBM3",))
ON_CPU = dataclasses.replace(HEALTHY, platform="cpu", kinds=("cpu",))


def changed(facts: Facts = HEALTHY, /, gpu: dict | None = None, **fields) -> Facts:
    if gpu:
        fields["gpus"] = (dataclasses.replace(H100, **gpu),)
    return dataclasses.replace(facts, **fields)


def without_gpu(**fields) -> Facts:
    return changed(ON_CPU, gpus=(), driver_error=None, versions=CUDA12, **fields)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            changed(versions=CUDA13 | {"jaxlib": "0.11.0", "jax-cuda13-plugin": "0.11.0"}),
            "together",
        ),
        (changed(versions=CUDA13 | {"jax-cuda13-plugin": "0.11.0"}), "ignores a plugin"),
        (
            changed(platform="", jax_error="RuntimeError: boom"),
            "does not start: RuntimeError: boom",
        ),
        (
            changed(platform="", jax_error="AssertionError", variables={"JAX_PLATFORMS": "cuda"}),
            "JAX_PLATFORMS=cuda: jax does not start with this value: unset it",
        ),
        (changed(ON_CPU, versions={"jax": "0.12.0", "jaxlib": "0.12.0"}), r"jax\[cuda13\]"),
        (
            changed(ON_CPU, gpu={"driver": "535.1"}, versions={"jax": "0", "jaxlib": "0"}),
            r"jax has no CUDA .* pip install 'jax\[cuda12\]'",
        ),
        (
            changed(ON_CPU, gpu={"capability": (7, 0)}, versions={"jax": "0", "jaxlib": "0"}),
            r"pip install 'jax\[cuda12\]'",
        ),
        (changed(ON_CPU, gpu={"driver": "470.1"}), "470.1, too old for any current jax"),
        (
            changed(ON_CPU, gpu={"driver": "550.54"}),
            r"needs driver 580; this machine has 550.54.*uninstall jax-cuda13-plugin "
            r"jax-cuda13-pjrt and "
            r"pip install 'jax\[cuda12\]'",
        ),
        (
            changed(gpu={"name": "Tesla V100", "capability": (7, 0)}),
            "V100 has .* 7.0; cuda13 needs",
        ),
        (changed(ON_CPU, variables={"JAX_PLATFORMS": "cpu"}), "JAX_PLATFORMS=cpu hides"),
        (changed(ON_CPU, variables={"CUDA_VISIBLE_DEVICES": ""}), "VISIBLE_DEVICES='' hides"),
        (changed(ON_CPU, variables={"LD_LIBRARY_PATH": "/usr/local/cuda/lib64"}), "another CUDA"),
        (changed(ON_CPU, jax_error="cuInit failed"), "its message: cuInit failed"),
        (
            changed(ON_CPU, jax_error="RuntimeError: Unable to load cuDNN. Is it installed?"),
            r"the extra plan does not install: pip install 'jax\[cuda13\]'",
        ),
        (
            changed(
                ON_CPU,
                gpus=(),
                driver_error="Failed to initialize NVML: Driver/library version "
                "mismatch\nNVML library version: 580.65",
            ),
            "NVML: Driver/library version mismatch': .* restart",
        ),
        (
            changed(
                ON_CPU,
                gpus=(),
                driver_error="NVIDIA-SMI has failed because it couldn't "
                "communicate with the NVIDIA driver.",
            ),
            "not loaded; modprobe",
        ),
        (
            changed(ON_CPU, gpus=(), driver_error="No devices were found"),
            "passed into this container",
        ),
        (
            changed(
                ON_CPU, gpus=(), driver_error='Field "compute_cap" is not a valid field to query.'
            ),
            "too old to report",
        ),
        (changed(ON_CPU, gpus=(), driver_error="out of cheese"), "fails: 'out of cheese'"),
    ],
)
def test_each_trouble_is_said_in_one_line(facts, words):
    found = list(problems(facts))
    assert len(found) == 1 and re.search(words, found[0]), found
    assert "\n" not in found[0]


def test_why_training_is_on_the_cpu(nvidia_smi, monkeypatch, capsys):
    """The line before a training on the CPU of a machine that has a GPU."""
    installed = dict(CUDA12)

    def packages(name):
        if name not in installed:
            raise facts.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(facts.importlib.metadata, "version", packages)
    for variable in facts.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    nvidia_smi("NVIDIA H100 80GB HBM3, 580.65.06, 81559, 4, 9.0")
    hidden = "jax does not use the GPU; its message: Unknown backend cuda"
    assert rules.why_no_gpu().startswith(hidden)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert rules.why_no_gpu().startswith("CUDA_VISIBLE_DEVICES='' hides every GPU")
    del installed["jax-cuda12-plugin"]
    assert "jax has no CUDA and runs on the CPU: pip install" in rules.why_no_gpu()

    with monkeypatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu,cuda")
        patch.setattr(jax, "devices", lambda platform: ["a GPU"])
        assert rules.why_no_gpu().startswith("JAX_PLATFORMS=cpu,cuda puts the CPU first")

    train.choose_devices(TrainConfig())
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("note: training on the CPU: there is a GPU (NVIDIA H100 80GB HBM3), but")
    with pytest.raises(UserError, match="^--accelerator gpu: there is a GPU"):
        train.choose_devices(TrainConfig(accelerator="gpu"))
    train.choose_devices(TrainConfig(accelerator="cpu"))
    assert capsys.readouterr().err == ""


def test_a_driver_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(rules, "has_driver", lambda: True)
    assert rules.why_no_gpu().startswith("jax sees no GPU; its message: Unknown backend cuda")
    monkeypatch.setattr(rules, "has_driver", lambda: False)
    assert rules.why_no_gpu() == ""
    with pytest.raises(UserError, match="^--accelerator gpu: there is no NVIDIA driver here$"):
        train.choose_devices(TrainConfig(accelerator="gpu"))


def test_two_cudas_at_once():
    found = list(problems(changed(versions=CUDA13 | {"jax-cuda12-plugin": "0.12.0"})))
    assert found == [
        "jax's plugins for CUDA 12 and for CUDA 13 are both installed: jax loads one, not always "
        "the same, and reports the other as an error; rwkv_jax.plan works with either: pip "
        "uninstall jax-cuda12-plugin jax-cuda12-pjrt"
    ]


@pytest.mark.parametrize("facts", [HEALTHY, without_gpu(), changed(versions=CUDA12)])
def test_nothing_is_said_of_a_healthy_machine(facts):
    assert list(problems(facts)) == []


def test_notes():
    assert list(notes(HEALTHY, 10**12)) == []
    full = changed(gpu={"used": 70000, "capability": (7, 5)}, platform="gpu")
    first, second = notes(full, 10**12)
    assert "70000 of 81559 MiB are in use" in first and "7.5 has no bf16" in second
    (disk,) = notes(HEALTHY, 5 * 10**9)
    assert disk.startswith("5.0 GB are free")
    (driver,) = notes(without_gpu(), 10**12)
    assert "--gpus all" in driver
    (tpu,) = notes(changed(gpus=(), versions={}, platform="tpu"), 10**12)
    assert "tpu" in tpu


@pytest.mark.slow
def test_on_this_machine(nvidia_smi, monkeypatch, capsys, tmp_path):
    """For real: facts, a rule that fires, the self-test, and the exit code."""
    nvidia_smi("NVIDIA GeForce RTX 4090, 550.54.14, 24564, 300, 8.9")
    monkeypatch.setattr(sys, "argv", ["doctor"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    versions = {"jax": "0.10.2", "jaxlib": "0.10.2"}
    monkeypatch.setattr(facts.importlib.metadata, "version", lambda name: versions.get(name, "1"))
    with pytest.raises(SystemExit) as exit:
        doctor.main()
    out = capsys.readouterr().out
    assert exit.value.code == 1
    assert "NVIDIA GeForce RTX 4090, compute capability 8.9, 24.0 GiB, driver 550.54.14" in out
    assert "WKV, bfloat16  xla: the Pallas kernels need an NVIDIA GPU" in out
    assert "JAX_PLATFORMS=cpu" in out and "problem: " in out
    within = re.search(r"self-test  fp32: 6 training steps, losses within (\S+) of", out)
    assert within and float(within[1]) < 1e-4


@pytest.mark.parametrize("says", ["", "E0000 something"])
def test_nothing_is_wrong_only_where_nothing_was_said(says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor"])
    monkeypatch.setattr(doctor, "run_trial", lambda: facts.Trial({}, {}, says, says))
    monkeypatch.setattr(doctor, "gather_facts", lambda _: changed(jax_error=says))
    doctor.main()
    *_, note, last = capsys.readouterr().out.splitlines()
    assert last == ("nothing else is wrong" if says else "nothing is wrong")
    assert (note == "note: jax printed at start-up: E0000 something") == bool(says)


def trial(**changes) -> facts.Trial:
    done = facts.Trial({}, {"fp32": self_test.KNOWN_LOSSES, "bf16": self_test.KNOWN_LOSSES}, "", "")
    return dataclasses.replace(done, **changes)


def test_a_machine_that_computes_something_else():
    assert "within 0 of" in self_test.check_losses(trial(), "fp32")
    for apart in (0.01, float("nan")):
        losses = np.array(self_test.KNOWN_LOSSES)
        losses[3] += apart
        with pytest.raises(UserError, match="computes wrong results"):
            self_test.check_losses(trial(losses={"fp32": losses}), "fp32")
    losses = np.array(self_test.KNOWN_LOSSES) + 0.01
    assert "within 0.01 of" in self_test.check_losses(trial(losses={"bf16": losses}), "bf16")


@pytest.mark.slow
def test_fp16_steps_that_overflow_are_done_again(tmp_path):
    """On GPUs before Ampere, which are tried in it: the loss scale begins too high."""
    self_test.write_self_test_data(tmp_path / "squares")
    with jax.numpy_dtype_promotion("standard"):
        losses = self_test.losses_of_small_model(tmp_path / "squares", "fp16")
    assert "6 training steps" in self_test.check_losses(trial(losses={"fp16": losses}), "fp16")


def test_a_training_that_fails():
    failed = trial(losses={}, last_message="XlaRuntimeError: no kernel image")
    with pytest.raises(UserError, match="training fails: XlaRuntimeError: no kernel image"):
        self_test.check_losses(failed, "fp32")


@pytest.mark.parametrize(
    ("program", "found", "losses", "start_message", "says"),
    [
        ("raise MemoryError('no GPU')", {}, {}, "MemoryError: no GPU", "MemoryError: no GPU"),
        (
            "print('warning'); print('{\"kinds\": 1}'); print('{\"fp32\": [1.5]}'); 1/0",
            {"kinds": 1}, {"fp32": [1.5]}, "warning", "ZeroDivisionError: division by zero",
        ),
        (
            "import os; print('{\"kinds\": 1}'); os.write(2, b'no cheese'); os.abort()",
            {"kinds": 1}, {}, "", "no cheese",
        ),
    ],
    ids=["does not start", "fails in bf16", "crashes"],
)  # fmt: skip
def test_whatever_happens_to_the_trial(program, found, losses, start_message, says, monkeypatch):
    monkeypatch.setattr(facts, "TRIAL", program)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert facts.run_trial() == facts.Trial(found, losses, start_message, says)


def test_a_trial_that_hangs(monkeypatch):
    """It never ends, so that any limit, and any machine, gives the same."""
    monkeypatch.setattr(facts, "TRIAL", "import signal; signal.pause()")
    monkeypatch.setattr(facts, "PATIENCE", 1.0)
    late = "not done after 1 seconds"
    assert facts.run_trial() == facts.Trial({}, {}, late, late)


BREAKAGES = {
    "the kernel": """
from pallas_kernels.wkv7 import chunked_xla
chunked_xla.DECAY_SCALE *= 1.1
""",
    "its gradient": """
from pallas_kernels.wkv7 import chunked_xla
backward = chunked_xla._backward
def wrong(precision, saved, cotangents):
    gradients, *rest = backward(precision, saved, cotangents)
    return gradients._replace(k=-gradients.k), *rest
chunked_xla._wkv7.defvjp(chunked_xla._forward, wrong)
""",
    "Adam": """
from rwkv_jax.training import optimizer
adam = optimizer.adam
optimizer.adam = lambda b1, b2, eps: adam(b1, 0.9 * b2, eps)
""",
}


@pytest.mark.parametrize("part", BREAKAGES)
@pytest.mark.slow
def test_a_broken_part_fails_the_self_test(part, monkeypatch):
    monkeypatch.setattr(facts, "TRIAL", BREAKAGES[part] + facts.TRIAL)
    with pytest.raises(UserError, match="computes wrong results"):
        self_test.check_losses(facts.run_trial(), "fp32")


@pytest.mark.torch
def test_the_known_losses_are_torchs(tmp_path):
    import torch

    from tests.support import torch_rwkv7

    options = TrainConfig(**self_test.SELF_TEST)
    steps = options.my_exit_tokens // (options.ctx_len * options.micro_bsz)
    self_test.write_self_test_data(tmp_path / "squares")
    data = open_dataset(str(tmp_path / "squares"), options.ctx_len, None, options.vocab_size)
    model = ModelConfig(options.n_layer, options.n_embd, options.vocab_size)
    weights.save_pth(tmp_path / "init.pth", self_test.starting_params(model))
    tensors = torch.load(tmp_path / "init.pth", weights_only=True).items()
    params = {name: tensor.double().requires_grad_() for name, tensor in tensors}
    adam = torch_rwkv7.adamw(params, options.weight_decay)
    losses = []
    for step in range(steps):
        batch = torch.from_numpy(data.batch(step, 1, options.micro_bsz).astype(np.int64))
        loss, _ = torch_rwkv7.train_step(params, adam, batch[:, :-1], batch[:, 1:], options.lr_init)
        losses.append(loss)
    # LAPACK differs between processors in an orthogonal matrix's last bits, which bf16 rounds.
    np.testing.assert_allclose(losses, self_test.KNOWN_LOSSES, rtol=0, atol=5e-5)
