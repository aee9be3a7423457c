"""Self-study that the model writes itself: after `ask` it proposes a question, then it answers it.

What a small model was taught (`training/data/statements.py`) is what a large one does when it is
given a generic request about a text: the kind of question is drawn, what it is about is sampled
from the model, its answer is what is likeliest. The conversations hold no `ask`; whoever reads them
sees questions and answers.

Dimensions: b conversations, t tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.language.inference.generation import sample
from models.language.prefix import Prefix, Reading, join
from models.language.transformer import Transformer
from training.data.statements import ENDS, REWRITINGS, WORDS

ASK, EQUALS = WORDS.index("ask"), WORDS.index("=")
QUESTION = 3  # tokens of a question: its kind, what it is about, the sign
ITEMS = 4  # statements of a rewriting
LONGEST = 4 * ITEMS  # tokens of an answer


@torch.no_grad()
def write(
    model: Transformer,
    documents: Prefix,
    length: int,
    generator: torch.Generator,
    kinds: Sequence[str],
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Conversations of `length` tokens [b, t], and which of them are answers, bool [b, t].

    Args:
        documents: what stands before each, [b, s, kv, hd].
        kinds: words that begin a question, equally likely.
        temperature: of what a question is about.
    """
    device, b = model.embed.weight.device, len(documents.layers[0][0])
    most = length + length // (QUESTION + 1) + 2  # tokens read, each `ask` included
    words = torch.tensor([WORDS.index(word) for word in kinds], device=device)
    rewriting = torch.tensor([WORDS.index(word) for word in REWRITINGS], device=device)
    ends = torch.tensor(ENDS, device=device)
    tokens = torch.zeros(b, length, dtype=torch.long, device=device)
    answers = torch.zeros(b, length, dtype=torch.bool, device=device)
    row = torch.arange(b, device=device)
    place = torch.zeros_like(row)  # where each row writes next
    said = torch.zeros_like(row)  # tokens since `ask`; -1: it is the next one
    left = torch.zeros_like(row)  # statements that the answer still has
    token, before = torch.full_like(row, ASK), documents
    for _ in range(most):
        reading = Reading(before)  # few tokens behind a short document: pages would cost more
        hidden = model.hidden(token[:, None], cache=reading)
        before = join([before, reading.prefix()], reading.position)
        logits = model.logits(hidden)[:, 0].float()
        asking, questioning = said < 0, (said >= 0) & (said < QUESTION)
        drawn = torch.randint(len(words), (b,), generator=generator, device=device)
        proposed = sample(logits, temperature, generator=generator)
        token = torch.where(said == 1, proposed, logits.argmax(-1))
        token = torch.where(said == 0, words[drawn], token)
        token = torch.where(said == 2, EQUALS, token)
        token = torch.where(asking, ASK, token)

        writing, at = ~asking & (place < length), place.clamp(max=length - 1)
        tokens[row, at] = torch.where(writing, token, tokens[row, at])
        answers[row, at] = torch.where(writing, ~questioning, answers[row, at])
        place = place + writing.long()

        several = (token[:, None] == rewriting).any(1)
        left = torch.where(said == 0, torch.where(several, ITEMS, 1), left)
        answering = said >= QUESTION
        left = left - ((token[:, None] == ends).any(1) & answering).long()
        over = answering & ((left <= 0) | (said >= QUESTION + LONGEST))
        said = torch.where(over, -1, said + 1)
        if not bool((place < length).any()):
            break
    return tokens, answers
