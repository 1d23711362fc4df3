"""Rules over the facts about a machine: its problems, each with a fix."""

import os
from collections.abc import Iterator

from rwkv_jax.device.nvidia import has_driver
from rwkv_jax.diagnosis.facts import CUDNN, PLUGINS, Facts, Trial, gather_facts

# The oldest driver for a CUDA version, and the oldest GPU that jax's build for it supports.
OLDEST_DRIVER = {"cuda12": 525, "cuda13": 580}
OLDEST_GPU = {"cuda12": (5, 2), "cuda13": (7, 5)}


def why_no_gpu() -> str:
    """Why jax uses the CPU and not the NVIDIA GPU, with a fix; empty without an NVIDIA driver.

    jax has to be started.
    """
    import jax

    try:
        jax.devices("cuda")
        return f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} puts the CPU first: unset it"
    except RuntimeError as error:
        message = str(error).splitlines()[0]
    facts = gather_facts(Trial({"platform": "cpu"}, {}, message, message))
    if not facts.gpus and not facts.driver_error and not has_driver():
        return ""
    return next(problems(facts), f"jax sees no GPU; its message: {message}")


def problems(facts: Facts) -> Iterator[str]:
    """Problems of this machine, each with a fix."""
    versions, wanted = facts.versions, _fitting_plugin(facts)
    if versions.get("jax") != versions.get("jaxlib"):
        yield (
            f"jax {versions.get('jax')} with jaxlib {versions.get('jaxlib')}: they belong "
            "together; pip install --upgrade jax jaxlib"
        )
    for name in PLUGINS:
        if name in versions and versions[name] != versions.get("jaxlib"):
            yield (
                f"{name} {versions[name]} with jaxlib {versions.get('jaxlib')}: jax ignores a "
                f"plugin of another version; pip install --upgrade 'jax[{name.split('-')[1]}]'"
            )
    if len(facts.plugins) == 2:
        yield (
            "jax's plugins for CUDA 12 and for CUDA 13 are both installed: jax loads one, not "
            "always the same, and reports the other as an error; rwkv_jax.plan works with either: "
            "pip uninstall " + " ".join(x for x in PLUGINS if wanted not in x)
        )
    if not facts.platform and "JAX_PLATFORMS" in facts.variables:
        yield (
            f"JAX_PLATFORMS={facts.variables['JAX_PLATFORMS']}: jax does not start with this "
            f"value: unset it. jax's message: {facts.jax_error}"
        )
    elif not facts.platform:
        yield f"jax does not start: {facts.jax_error}"
    if facts.driver_error:
        yield _driver_problem(facts.driver_error)
    if not facts.gpus:
        return
    driver = int(facts.gpus[0].driver.partition(".")[0])
    if driver < OLDEST_DRIVER["cuda12"]:
        yield (
            f"the NVIDIA driver is {facts.gpus[0].driver}, too old for any current jax: install "
            f"{OLDEST_DRIVER['cuda12']} or newer"
        )
    elif not facts.plugins:
        yield (
            f"there is a GPU ({facts.gpus[0].name}), but jax has no CUDA and runs on the CPU: "
            f"pip install 'jax[{wanted}]', or this project's extra {wanted}"
        )
    for kind in facts.plugins:
        if OLDEST_DRIVER["cuda12"] <= driver < OLDEST_DRIVER[kind]:
            yield (
                f"jax's plugin is for {kind}, which needs driver {OLDEST_DRIVER[kind]}; this "
                f"machine has {facts.gpus[0].driver}: update the driver, or pip uninstall "
                f"{' '.join(x for x in PLUGINS if kind in x)} and pip install 'jax[{wanted}]'"
            )
        too_old = [gpu for gpu in facts.gpus if (0, 0) < gpu.capability < OLDEST_GPU[kind]]
        if too_old:
            yield (
                f"{too_old[0].name} has compute capability {dotted(too_old[0].capability)}; "
                f"{kind} needs {dotted(OLDEST_GPU[kind])}: use cuda12, or a newer GPU"
            )
    runs_plugin = all(driver >= OLDEST_DRIVER[kind] for kind in facts.plugins)
    if facts.plugins and facts.platform == "cpu" and runs_plugin:
        yield from _hidden_gpu(facts)


def _hidden_gpu(facts: Facts) -> Iterator[str]:
    """Why jax does not use a GPU although the driver and the plugin are installed."""
    if "cpu" in facts.variables.get("JAX_PLATFORMS", ""):
        yield f"JAX_PLATFORMS={facts.variables['JAX_PLATFORMS']} hides the GPU: unset it"
    elif facts.variables.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        value = facts.variables["CUDA_VISIBLE_DEVICES"]
        yield f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU: unset it, or name one (0)"
    elif "cuda" in facts.variables.get("LD_LIBRARY_PATH", "").lower():
        yield (
            f"LD_LIBRARY_PATH ({facts.variables['LD_LIBRARY_PATH']}) puts another CUDA before the "
            "one that pip installed for jax: unset it"
        )
    elif not any(name in facts.versions for name in CUDNN) and "cuDNN" in facts.jax_error:
        yield (
            "jax does not find CUDA's libraries, which the extra plan does not install: pip "
            f"install 'jax[{_fitting_plugin(facts)}]'"
        )
    else:
        yield f"jax does not use the GPU; its message: {facts.jax_error or 'none'}"


def _driver_problem(message: str) -> str:
    first = message.splitlines()[0]
    if "version mismatch" in message:
        return (
            f"nvidia-smi reports {first!r}: the driver was updated while the old kernel module is "
            "loaded; restart the machine"
        )
    if "communicate with the NVIDIA driver" in message:
        return (
            f"nvidia-smi reports {first!r}: the driver is installed but not loaded; modprobe "
            "nvidia, or reinstall it for this kernel"
        )
    if "No devices were found" in message:
        return "nvidia-smi finds no GPU: is it passed into this container or virtual machine?"
    if "not a valid field" in message:
        return (
            "the NVIDIA driver is too old to report a GPU's compute capability: install "
            f"{OLDEST_DRIVER['cuda12']} or newer"
        )
    return f"nvidia-smi fails: {first!r}"


def notes(facts: Facts, free_disk: int) -> Iterator[str]:
    """Notes that are not problems. `free_disk` in bytes."""
    for number, gpu in enumerate(facts.gpus):
        if gpu.used > 0.1 * gpu.memory > 0:
            yield (
                f"GPU {number}: {gpu.used} of {gpu.memory} MiB are in use by other programs "
                "(nvidia-smi lists them); training allocates most of a GPU's memory when it starts"
            )
        if facts.platform == "gpu" and gpu.capability < (8, 0):
            yield (
                f"GPU {number}: compute capability {dotted(gpu.capability)} has no bf16 units; "
                "the default --precision there is fp16"
            )
    if facts.plugins and facts.driver_error is None:
        yield (
            "jax has a CUDA plugin, but there is no NVIDIA driver (no nvidia-smi): jax can compile "
            "for a GPU (python -m rwkv_jax.plan) but not use one. Install the driver; start a "
            "container with --gpus all"
        )
    if facts.platform not in ("", "cpu", "gpu"):
        yield f"this program is not tested on {facts.platform}"
    if free_disk < 10e9:
        yield (
            f"{free_disk / 1e9:.1f} GB are free in this folder: a checkpoint takes 12 bytes per "
            "parameter, and two are kept"
        )


def _fitting_plugin(facts: Facts) -> str:
    """cuda12 or cuda13: the newest that the driver and the GPUs support."""
    fits = [
        kind
        for kind in OLDEST_DRIVER
        if facts.gpus
        and int(facts.gpus[0].driver.partition(".")[0]) >= OLDEST_DRIVER[kind]
        and all(gpu.capability >= OLDEST_GPU[kind] for gpu in facts.gpus)
    ]
    return fits[-1] if fits else "cuda12"


def dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
