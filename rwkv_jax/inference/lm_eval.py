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
from rwkv_jax.inference.scoring import Answer, Document, score
from rwkv_jax.model.rwkv7 import bind
from rwkv_jax.text import tokenizer


@register_model("rwkv_jax")
class HarnessModel(LM):
    """A model as the harness asks it: in float32, each text after a token 0, none cut short.

    Args:
        load_model: whatever `rwkv_jax.load` takes.
    """

    def __init__(self, load_model: str, **_: Any) -> None:
        super().__init__()
        prepare_jax()
        config, params = rwkv_jax.load_params(load_model)
        tokenizer.check_vocabulary(config.vocab_size, load_model)
        self._model = bind(config, jax.tree.map(jnp.asarray, params))
        self._decoder = Decoder(config, params, "fp32")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is what greedy decoding gives), one a request."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            # A blank at the end of the context belongs to the token that follows.
            kept = context.rstrip()
            pairs.append(
                (tokenizer.encode(kept), tokenizer.encode(context[len(kept) :] + continuation))
            )
        return [(-answer.nats, answer.first) for answer in self._answers(pairs)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of each text: no window rolls, the state carries all that was read."""
        whole: list[tuple[list[int], list[int]]] = [
            ([], tokenizer.encode(request.args[0])) for request in requests
        ]
        return [-answer.nats for answer in self._answers(whole)]

    def _answers(self, pairs: list[tuple[list[int], list[int]]]) -> list[Answer]:
        """Of the second part of each pair of ids, after the first."""
        documents = [
            Document(before + after, [(len(before), len(before) + len(after))])
            for before, after in pairs
        ]
        answers = dict(score(self._model, documents))
        return [answers[number][0] for number in range(len(pairs))]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy or, where a request asks for it, drawn; up to one of its stop strings."""
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
