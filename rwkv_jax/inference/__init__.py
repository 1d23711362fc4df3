"""The use of a trained model.

decoder.py     recurrent decoding: prefill and one token after the other
sampling.py    from logits to a token
generation.py  texts and chats on a decoder
scoring.py     log-probabilities of documents
tasks.py       what `evaluate` scores: text, LAMBADA, arithmetic
lm_eval.py     the adapter for the lm-evaluation-harness
"""
