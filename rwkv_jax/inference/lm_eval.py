"""An adapter for EleutherAI's lm-evaluation-harness (the extra `rwkv-jax[lm-eval]`).

    import lm_eval
    from rwkv_jax.inference.lm_eval import HarnessModel
    lm_eval.simple_evaluate(HarnessModel("out/rwkv-final.pth"), tasks=["lambada_openai"])

Importing it also registers the name for `--model rwkv_jax --model_args load_model=X`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

import rwkv_jax
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.inference.decoder import Decoder
from rwkv_jax.inference.generation import Reply, Text, generate
from rwkv_jax.inference.sampling import GREEDY
from rwkv_jax.inference.scoring import Document, SpanScore, score
from rwkv_jax.model.rwkv7 import bind
from rwkv_jax.text import tokenizer


@register_model("rwkv_jax")
class HarnessModel(LM):
    """The harness's model interface.

    Computes in float32; each text starts with token 0; no text is truncated.

    Args:
        load_model: anything that `rwkv_jax.load` accepts.
    """

    def __init__(self, load_model: str, **_: Any) -> None:
        super().__init__()
        prepare_jax()
        config, params = rwkv_jax.load_params(load_model)
        tokenizer.check_vocabulary(config.vocab_size, load_model)
        self._model = bind(config, jax.tree.map(jnp.asarray, params))
        self._decoder = Decoder(config, params, "fp32")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether greedy decoding gives it), one per request."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            # Whitespace at the end of the context belongs to the first token of the continuation.
            stripped = context.rstrip()
            blank = context[len(stripped) :]
            pairs.append((tokenizer.encode(stripped), tokenizer.encode(blank + continuation)))
        return [(-span.nats, span.first) for span in self._scores(pairs)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of each text. No rolling window: the state carries the whole text."""
        pairs: list[tuple[list[int], list[int]]] = [
            ([], tokenizer.encode(request.args[0])) for request in requests
        ]
        return [-span.nats for span in self._scores(pairs)]

    def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[SpanScore]:
        """Scores the second part of each pair of ids, given the first."""
        documents = [
            Document(before + after, [(len(before), len(before) + len(after))])
            for before, after in pairs
        ]
        scores = dict(score(self._model, documents))
        return [scores[number][0] for number in range(len(pairs))]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generates up to a stop string, greedily or, if a request asks for it, by sampling."""
        texts = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            reply = Reply([until] if isinstance(until, str) else until)
            sampling = GREEDY
            if options.get("do_sample") and options.get("temperature"):
                sampling = GREEDY._replace(
                    temperature=options["temperature"],
                    top_p=options.get("top_p", 1.0),
                    top_k=options.get("top_k", 0),
                )
            text = Text().then(tokenizer.encode(context))
            for _ in generate(
                self._decoder, [text], [reply], options.get("max_gen_toks", 256), sampling
            ):
                pass
            texts.append(reply.text)
        return texts
