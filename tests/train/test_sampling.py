"""Text from tokens as they are drawn."""

import torch

from fastlm.data import ByteTokenizer
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
