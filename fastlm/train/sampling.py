"""Text from a model, as it is drawn."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator

import torch

from fastlm.data import Tokenizer
from fastlm.models import GPT
from fastlm.train.config import TrainConfig
from fastlm.train.evaluation import autocast


def stream_text(
    model: GPT,
    config: TrainConfig,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.6,
    top_k: int | None = 50,
    seed: int = 0,
    use_cache: bool = True,
    one_document: bool = True,
) -> Iterator[str]:
    """Yields the prompt and then the text of up to `tokens` tokens more, in pieces of whole characters.

    The model sees the end-of-document token and then the prompt, as at the start of a document; drawing it again ends
    the text, or a document of it if one_document is False. The same seed gives the same text.
    """
    ids = [tokenizer.eot, *tokenizer.encode(prompt).tolist()]
    generator = torch.Generator(config.device).manual_seed(seed)
    idx = torch.tensor([ids], device=config.device)  # (1, T)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    yield prompt
    drawn = model.generate(idx, tokens, temperature=temperature, top_k=top_k, generator=generator, use_cache=use_cache)
    while True:
        with autocast(config):  # around the draw alone: while this waits, the caller's own code runs
            token = next(drawn, None)
        if token is None:
            break
        if (number := token.item()) == tokenizer.eot:
            if one_document:
                break
            yield decoder.decode(b"", final=True) + "\n\n"
            continue
        if number >= tokenizer.vocab_size:
            continue  # it only pads the head; an untrained model may draw it
        if text := decoder.decode(tokenizer.decode_bytes([number])):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


_WORD = re.compile(r"[^\W\d_]{2,}")  # two letters or more


def known_word_share(text: str, documents: Iterable[str]) -> float | None:
    """Of the words in `text`, counted as often as they stand there, the share that `documents` hold too; None for none.

    A word is a run of at least two letters, in the same case.
    """
    words = _WORD.findall(text)
    if not words:
        return None
    unknown = set(words)
    for document in documents:
        unknown.difference_update(_WORD.findall(document))
    return sum(word not in unknown for word in words) / len(words)
