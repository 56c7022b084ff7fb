"""Text from tokens as they are drawn."""

import random

import torch

from fastlm.data import BPETokenizer, ByteTokenizer
from fastlm.train.sampling import stream_text


class Scripted:
    """Stands for a model: draws the given tokens, and keeps what it was asked to continue."""

    def __init__(self, tokens):
        self.tokens, self.asked = tokens, None

    def generate(self, idx, count, **options):
        self.asked = idx.tolist()
        yield from (torch.tensor([token]) for token in self.tokens[:count])


def test_the_prompt_stands_at_the_start_of_a_document(small):
    model = Scripted([*b" cat", 256, *b"more"])
    assert "".join(stream_text(model, small, ByteTokenizer(), "the", 100)) == "the cat"
    assert model.asked == [[256, *b"the"]]
    assert "".join(stream_text(model, small, ByteTokenizer(), "", 100, one_document=False)) == " cat\n\nmore"
    assert model.asked == [[256]]


def test_a_stream_has_the_characters_of_its_tokens(small):
    """Tokens that end inside characters, of which the next brings the rest and the beginning of another."""
    draw = random.Random(0)
    text = "".join(chr(draw.randrange(0x4E00, 0x4E40)) for _ in range(20_000))
    tokenizer = BPETokenizer.train([text], 400)
    ids = tokenizer.encode(text[:1000]).tolist()
    inside = sum(not text.startswith(tokenizer.decode(ids[:n])) for n in range(len(ids)))
    assert inside > 200
    pieces = list(stream_text(Scripted(ids), small, tokenizer, "", len(ids)))
    assert "".join(pieces) == text[:1000] and len(pieces) > 200

    for ids in ([draw.randrange(tokenizer.eot) for _ in range(300)] for _ in range(20)):  # no text, and cut anywhere
        assert "".join(stream_text(Scripted(ids), small, tokenizer, "", 300)) == tokenizer.decode(ids)
    bytewise = [*b"\xe4\xb8", 256, *b"\x80x\xe4"]
    streamed = "".join(stream_text(Scripted(bytewise), small, ByteTokenizer(), "", 9, one_document=False))
    assert streamed == "\ufffd\n\n\ufffdx\ufffd"
