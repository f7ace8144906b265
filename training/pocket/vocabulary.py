"""The words that captions use, as a small table of token ids.

CLIP's vocabulary has 49,408 tokens, the captions here use a few hundred. Training keeps rows for those alone,
and one for every other token: captions now and then name things by words the model does not know, so that
row learns to mean "whatever it is". On export each unused row of the full table is a copy of it. A user's
"hazelnut" is then read as some thing, not as noise.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from generation.cut.tokens import build_tokenizer
from training.pocket import captions
from training.pocket.materials import GENERIC_NOUNS, PARTS, SURFACES

SIZES = ("tiny", "small", "medium", "large", "long", "short", "wide")
SHAPES = ("thin", "thick", "jagged", "branching", "round", "irregular", "curved", "straight", "elongated")
SEVERITIES = ("faint", "slight", "clear", "deep", "strong")
COLOURS = ("dark", "black", "bright", "white", "brown", "grey", "red", "blue", "green", "yellow", "rusty")
GLUE = "a an the with on in at of to that is are it its and without any . ,"


class Vocabulary:
    """Token ids of the full vocabulary to rows of the small one, in order, the unknown row first."""

    def __init__(self) -> None:
        self.tokenizer: CLIPTokenizer = build_tokenizer()
        words = [
            GLUE,
            *captions.HEADS,
            *captions.PRAISE,
            *captions.FLAWS,
            *captions.PLACES.values(),
            "in the top left in the top right in the bottom left in the bottom right",
            "on it on its surface in the surface",
            *(noun for nouns in captions.NOUNS.values() for noun in nouns),
            *captions.ADJECTIVES.values(),
            *(noun for _, nouns in SURFACES.values() for noun in nouns),
            *(noun for _, nouns in PARTS.values() for noun in nouns),
            *GENERIC_NOUNS,
            *(
                template.translate(str.maketrans("{}", "  "))
                for entry in captions.ENTRIES.values()
                for template in (*entry.prompts, *entry.details)
            ),
            *(
                word
                for entry in captions.ENTRIES.values()
                for word in (*entry.shape, *entry.size, *entry.severity)
            ),
            *SIZES,
            *SHAPES,
            *SEVERITIES,
            *COLOURS,
        ]
        ids = {i for text in words for i in self.tokenizer(text)["input_ids"]}
        self.known = sorted(ids)
        self.rows = torch.zeros(len(self.tokenizer), dtype=torch.long)
        self.rows[torch.tensor(self.known)] = torch.arange(1, len(self.known) + 1)

    @cached_property
    def size(self) -> int:
        return len(self.known) + 1

    def __call__(self, texts: list[str]) -> Tensor:
        """int64, N×77, rows of the small table."""
        padded = self.tokenizer(
            texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        return self.rows[padded["input_ids"]]

    def expand(self, small: Tensor) -> Tensor:
        """The full embedding table of a small one."""
        return small[self.rows]
