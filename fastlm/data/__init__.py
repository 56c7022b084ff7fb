"""Text to training batches: corpus, tokenizer, token files, batches, and an n-gram baseline.

data = prepare("stdlib", "corpus")
x, y = get_batch(data.train, seed=0, step=0, batch_size=8, block_size=256)
"""

try:
    import numpy  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("fastlm.data needs the package numpy: pip install 'fastlm[train]'") from error

from fastlm.data.corpus import CleaningReport, Corpus, clean_text, load_corpus
from fastlm.data.dataset import Dataset, prepare
from fastlm.data.ngram import NGramModel, ngram_bits_per_byte
from fastlm.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from fastlm.data.tokens import TokenFile, bits_per_byte, get_batch, iterate_all

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "CleaningReport",
    "Corpus",
    "Dataset",
    "NGramModel",
    "TokenFile",
    "Tokenizer",
    "bits_per_byte",
    "clean_text",
    "get_batch",
    "iterate_all",
    "load_corpus",
    "load_tokenizer",
    "ngram_bits_per_byte",
    "prepare",
]
