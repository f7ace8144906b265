"""Captions of scenes and defects, in varied wording."""

from __future__ import annotations

from generation.cut.prompts import load_bank
from manifests.wording import fill_template
from training.pocket.damage import Damage
from training.pocket.materials import GENERIC_NOUNS, Rng, Scene

HEADS = (
    "a photo of",
    "a photo of",
    "a photo of",
    "a picture of",
    "a close-up photo of",
    "an image of",
    "a close view of",
)
# How each defect may be called: noun phrases after an article, and adjectives or clauses after the part.
NOUNS = {
    "crack": ("crack", "crack", "fracture"),
    "scratch": ("scratch", "scratch", "scrape"),
    "hole": ("hole", "hole", "puncture"),
    "dent": ("dent", "dent", "dimple"),
    "stain": ("stain", "stain", "smudge"),
    "spot": ("spot", "spot", "dot"),
    "discoloration": ("discoloration", "discoloration", "discolored area"),
    "contamination": ("contamination", "contamination", "foreign particles", "dirt"),
    "fold": ("fold", "fold", "crease", "wrinkle"),
    "broken edge": ("broken edge", "broken edge", "chipped edge"),
    "missing piece": ("missing piece", "missing piece", "missing part"),
    "bent": ("bend", "bent area"),
    "thread": ("thread", "thread", "fibre", "hair"),
    "burn": ("burn", "burn", "burn mark"),
}
ADJECTIVES = {
    "crack": "cracked",
    "scratch": "scratched",
    "dent": "dented",
    "stain": "stained",
    "discoloration": "discolored",
    "contamination": "contaminated",
    "fold": "folded",
    "broken edge": "broken",
    "bent": "bent",
    "burn": "burnt",
}
PRAISE = ("good", "clean", "flawless", "perfect", "normal")
FLAWS = ("defects", "damage", "a defect", "any flaw")
UNCOUNTED = ("contamination", "foreign particles", "dirt", "discoloration")
PLACES = {
    "centre": "in the centre",
    "top": "at the top",
    "bottom": "at the bottom",
    "left": "on the left",
    "right": "on the right",
}
UNKNOWN = "unknownword"  # stands for any word that the captions never use; see vocabulary.py


def article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def thing(rng: Rng, scene: Scene) -> str:
    """What the picture shows: its noun, a generic one, or words that the model does not know."""
    draw = rng.random()
    if draw < 0.6:
        return scene.noun
    if draw < 0.8:
        return str(rng.choice(GENERIC_NOUNS))
    return " ".join([UNKNOWN] * int(rng.integers(1, 4)))


def normal_caption(rng: Rng, noun: str) -> str:
    draw = rng.random()
    if draw < 0.12:
        return f"{rng.choice(HEADS)} {article(f'{rng.choice(PRAISE)} {noun}')}"
    if draw < 0.2:
        return f"{rng.choice(HEADS)} {article(noun)} without {rng.choice(FLAWS)}"
    return f"{rng.choice(HEADS)} {article(noun)}"


ENTRIES = {entry.defect: entry for entry in load_bank().entries}
BANKED = 0.25  # share of captions in the words of the prompt bank, so that its sentences are known


def banked_caption(rng: Rng, noun: str, found: Damage) -> str:
    """A prompt or a description of the shipped bank, filled with what was drawn where it has the word."""
    entry = ENTRIES[found.defect]
    template = str(rng.choice(entry.prompts if rng.random() < 0.4 else entry.details))
    chosen = {}
    for key, known in (("size", entry.size), ("shape", entry.shape), ("severity", entry.severity)):
        chosen[key] = (
            found.words[key] if found.words[key] in known else str(rng.choice(known)) if known else ""
        )
    return fill_template(template, noun, chosen["size"], chosen["shape"], chosen["severity"])


def defect_caption(rng: Rng, noun: str, found: Damage) -> str:
    """Mentions the defect always, and each attribute now and then."""
    if rng.random() < BANKED:
        return banked_caption(rng, noun, found)
    word = str(rng.choice(NOUNS[found.defect]))
    draw = rng.random()
    if found.defect in ADJECTIVES and draw < 0.15:
        adjective = ADJECTIVES[found.defect]
        head = str(rng.choice(HEADS))
        return (
            f"{head} {article(noun)} that is {adjective}"
            if rng.random() < 0.5
            else f"{head} {article(f'{adjective} {noun}')}"
        )
    said = [
        found.words[key]
        for key, chance in (("severity", 0.3), ("size", 0.5), ("shape", 0.4), ("colour", 0.5))
        if found.words[key] and rng.random() < chance
    ]
    phrase = " ".join([*said, word])
    phrase = phrase if word in UNCOUNTED else article(phrase)
    place = found.words["place"]
    where = PLACES.get(place, f"in the {place}") if rng.random() < 0.5 else ""
    on = str(rng.choice(["on it", "", "on its surface", "in the surface"]))
    tail = " ".join(part for part in (phrase, where or on) if part)
    if draw > 0.9:
        return f"{tail} on {article(noun)}" if not where else f"{article(noun)}, {tail}"
    return f"{rng.choice(HEADS)} {article(noun)} with {tail}"
