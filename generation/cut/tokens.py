"""CLIP's tokens: the tokenizer without a hub, and where a word stands among the tokens of a prompt."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING, Any

from open_clip.tokenizer import bytes_to_unicode, default_bpe
from transformers import CLIPTokenizer

from generation.cut.prompts import find_word

if TYPE_CHECKING:
    from generation.cut.models import StableDiffusion


def build_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer from the byte-pair vocabulary that open_clip ships; no hub is needed.

    Args:
        pad: the padding token: end of text as in Stable Diffusion 1.x, ``!`` in 2.x.

    Returns:
        A tokenizer whose ids equal ``open_clip.SimpleTokenizer``'s, 77 tokens a text. With the padding of 2.x
        a ``!`` in a text is read as padding, as by the published tokenizer.
    """
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as lines:
        merges: Any = [tuple(line.split()) for line in lines.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=77)


def token_positions(sd: StableDiffusion, prompt: str, word: str) -> list[int]:
    """Where the anomaly word, or several words in a row, stand in a prompt's tokens, by the rule of
    :func:`generation.cut.prompts.find_word`: whole words, any case, the last of several places.

    Returns:
        Ascending indices into the rows of :meth:`StableDiffusion.tokens` (begin of text is 0), every
        byte-pair token of the word.

    Raises:
        UsageError: the word is not in the prompt, or the prompt is cut off.
    """
    sd.tokens([prompt])  # refuses a prompt that is cut off
    first, last = find_word(prompt, word)
    offsets = sd.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    return [
        index for index, (start, end) in enumerate(offsets) if start < end and start < last and first < end
    ]
