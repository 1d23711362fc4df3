"""Inference with a trained model.

decoder.py     recurrent decoding: prefill, then one token at a time
sampling.py    from logits to a token
generation.py  texts and chats with a decoder
scoring.py     log-probabilities of documents
tasks.py       what `evaluate` scores: text, LAMBADA, arithmetic
evaluation.py  the metrics of `evaluate`
lm_eval.py     the adapter for the lm-evaluation-harness
"""
