"""The lm-evaluation-harness, run on local tasks: its numbers are those of our own evaluation."""

import json
import math
from pathlib import Path

import jax
import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from rwkv_jax.inference import evaluation, generation, scoring
from rwkv_jax.inference.decoder import Decoder
from rwkv_jax.inference.lm_eval import HarnessModel
from rwkv_jax.inference.sampling import GREEDY
from rwkv_jax.text import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own, and its packages'

ORACLE = Path(__file__).parents[1] / "data" / "oracles" / "tiny_v512_rand_fp32.pth"
TEXTS = [  # of bytes and numbers below the oracle's 512 tokens
    "1 2 + 3 4 = 4 6",
    "5 + 5 = 1 0",
    "a b c d e f",
    "x y x y x y x",
]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.rpartition(' ')[0]}}}}"
doc_to_target: "{{{{' ' + text.rpartition(' ')[2]}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> HarnessModel:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        jax.config.update(
            "jax_compilation_cache_dir", None
        )  # another module's command may have set it
        model = HarnessModel(str(ORACLE))
    assert jax.config.values["jax_compilation_cache_dir"] == f"{cache}/rwkv_jax/compiled"
    return model


@pytest.mark.slow
def test_the_harness_measures_what_evaluate_does(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(file=data))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, tasks=["tiny"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
    )["results"]["tiny"]
    ours = evaluation.evaluate(model._model, "lambada", data)
    assert results["perplexity,none"] == pytest.approx(ours["perplexity"], rel=1e-6)
    assert results["acc,none"] == ours["accuracy"]
    assert 1 < ours["perplexity"] < 1e9


def ask(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


def test_rolling_and_generation(model):
    rolling = model.loglikelihood_rolling(ask("loglikelihood_rolling", *[(t,) for t in TEXTS]))
    pairs = model.loglikelihood(ask("loglikelihood", *[("", text) for text in TEXTS]))
    np.testing.assert_allclose(rolling, [pair[0] for pair in pairs], rtol=1e-6)
    ids = tokenizer.encode(TEXTS[2])
    ((_, (answer,)),) = scoring.score(model._model, [scoring.Document(ids, [(0, len(ids))])])
    assert rolling[2] == pytest.approx(-answer.nats, rel=1e-6)
    assert all(math.isfinite(value) and value < 0 for value in rolling)

    decoder: Decoder = model._decoder
    (free,) = generation.complete(decoder, TEXTS[:1], 12, GREEDY)
    options = {"until": [free[4:6]], "max_gen_toks": 12, "do_sample": False}
    asked = [(TEXTS[0], options), (TEXTS[0], {"until": "\n\n\n", "max_gen_toks": 12})]
    stopped, whole = model.generate_until(ask("generate_until", *asked))
    assert whole == free and stopped == free[: free.find(free[4:6])]
    assert not any(greedy for _, greedy in pairs)
