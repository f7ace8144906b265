"""The settings of ``cut``, their defaults and the published preset (core.md 1.8)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from generation.cut.prompts import PromptParams
from manifests.searching import Search

PAPER: dict[str, Any] = {
    "steps": 100,
    "gamma": 0.25,
    "guidance": 12.5,
    "inner": 10,
    "every": 1,
    "twin": "empty",
    "composition": "paste",
    "mask": "attention",
}


class CutParams(PromptParams):
    """Settings of ``cut``.

    Attributes:
        preset: ``paper`` starts from what is known of the publication (core.md 1.2, 1.5); settings that are
            given beside it win.
        model: ``pocket``, a hub id, or a folder in diffusers' layout (any Stable Diffusion 1.x or 2.x).
        clip: of the refinement: ``pocket``, ``MODEL/TAG`` of open_clip, ``hf-hub:…`` or a folder; ``auto``:
            the shipped one beside the shipped model, a ViT-B/16 beside any other; null leaves the refinement
            out.
        judge: of the CLIP gate, named alike; ``auto``: the shipped one beside the shipped model, where it is
            the only one at hand, else a ViT-B/32, which the refinement did not follow; null: no CLIP gate.
        dtype: of the networks; ``auto``: float16 on a GPU, float32 elsewhere.
        size: side of the pictures that the model works on, in pixels; null: its native size.
        batch: chains at a time.
        steps: T, timesteps of the whole chain.
        gamma: γ, share of the chain that is run, from the noise level that belongs to it: larger is freer.
        guidance: weight of the anomaly prompt over the normal one.
        attention: λ, strength of the attention-guided steps; 0 leaves them out.
        every: attention-guided at every n-th timestep.
        inner: gradient steps at each of them.
        reach: attention at which the word has taken hold and guidance rests, in [0, 1].
        align: move the anomaly word's embedding towards the detailed description first (1.7).
        refinement: strength of the prompt-guided refinement; 0 leaves it out.
        window: share of the executed steps, at the end, in which refinement acts and attention is read.
        twin: how the normal chain is evaluated (1.16): ``normal`` (three evaluations a step), ``shared``
            (two: the anomaly chain borrows the normal chain's), ``empty`` (four: both against the empty
            prompt).
        composition: ``residual`` adds the twins' difference to the source, ``gradient`` blends it by its
            gradients, ``paste`` takes the generated pixels.
        mask: ``twin`` difference, ``attention`` × picture difference, or their ``product``.
        zoom: how much of the crop's side the anomaly's place may take; smaller works on a wider view.
        free: no location: the model chooses the place within the allowed one.
    """

    preset: Literal["default", "paper"] = "default"
    model: str = "pocket"
    clip: str | None = "auto"
    judge: str | None = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    size: int | None = Field(None, ge=64)
    batch: int = Field(4, ge=1, le=256)
    steps: int = Field(30, ge=1, le=1000)
    gamma: Annotated[float, Search(0.4, 0.95)] = Field(0.7, ge=0, le=1)
    guidance: Annotated[float, Search(1.5, 9, log=True)] = Field(3.5, ge=0)
    attention: Annotated[float, Search(0, 15)] = Field(5.0, ge=0)
    every: int = Field(3, ge=1)
    inner: int = Field(1, ge=1, le=50)
    reach: float = Field(0.9, ge=0, le=1)
    align: bool = False
    refinement: Annotated[float, Search(0, 1)] = Field(0.3, ge=0)
    window: float = Field(0.3, gt=0, le=1)
    twin: Literal["normal", "shared", "empty"] = "normal"
    composition: Literal["residual", "gradient", "paste"] = "residual"
    mask: Literal["twin", "attention", "product"] = "twin"
    zoom: float = Field(0.7, gt=0.1, le=1)
    free: bool = False

    @property
    def guide(self) -> str | None:
        """The CLIP of the refinement by its name."""
        return self._named(self.clip, "ViT-B-16/laion2b_s34b_b88k")

    @property
    def referee(self) -> str | None:
        """The CLIP of the gate by its name."""
        return self._named(self.judge, "ViT-B-32/laion2b_s34b_b79k")

    def _named(self, clip: str | None, large: str) -> str | None:
        return clip if clip != "auto" else "pocket" if self.model == "pocket" else large

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "paper":
            return {**PAPER, **values}
        return values
