"""How likely a model finds given texts as its answer, without writing any."""

from collections.abc import Sequence

import torch

from megabagel.inference.generator import Generator, Prompt


def log_likelihoods(generator: Generator, prompt: Prompt, texts: Sequence[str]) -> list[float]:
    """Natural logarithm of the probability of each of `texts`, with its end, after `prompt`; of whole texts, so that
    longer ones have less. Every rank of the model calls it alike."""
    special = generator.network.geometry.special_tokens
    (conversation,) = generator._open([prompt], [0], None, draws=False)
    ids = [generator.tokenizer.encode(text) for text in texts]
    contexts = [conversation.context.fork() for _ in texts]
    hidden = generator.network.read_tokens(contexts, [[special.bos, *tokens] for tokens in ids])
    found = []
    for rows, tokens in zip(hidden, ids, strict=True):
        scores = torch.log_softmax(generator.network.logits(rows), dim=-1)
        labels = torch.tensor([*tokens, special.eos], device=scores.device)
        found.append(float(scores.gather(1, labels[:, None]).double().sum()))
    return found
