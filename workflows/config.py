"""The configuration: one YAML file, every default here, unknown names refused with the nearest known one.

Three lines suffice::

    source: pictures/bottle
    samples: 300
    rounds: 2
"""

from __future__ import annotations

import difflib
import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from generation.gates import Gates
from manifests.errors import UsageError
from manifests.plain import from_yaml
from manifests.recipes import AreaRange, CountRange, GeneratorSettings, Share, UnitRange, ordered
from manifests.searching import Search
from manifests.sources import SourceSettings

if TYPE_CHECKING:
    from detectors.protocol import Method
    from detectors.protocol import Settings as DetectorSettings


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


DEFAULT_MIX = {
    "perlin": GeneratorSettings(params={"texture": "procedural"}),
    "cutpaste": GeneratorSettings(),
    "scar": GeneratorSettings(),
    "poisson": GeneratorSettings(),
    # A piece that is missing by half looks like a film. With three shares instead of one OneNIP learned 0.030
    # more pixel AP and 0.013 more AUPRO (four categories of real pictures, one seed), `residual` as much.
    "chip": GeneratorSettings(severity=(1.0, 1.0), share=3.0),
    "band": GeneratorSettings(),
}


class Practice(Settings):
    """Samples that the detector of the round before does not find; from a configuration's second round on."""

    candidates: int = Field(
        1,
        ge=1,
        le=64,
        description="draws of a recipe of which the one found least is kept; 1: the first; not cut",
    )
    guidance: float = Field(
        0.0, ge=0, description="cut: strength of the steps towards what is not found; 0 leaves them out"
    )

    @property
    def wanted(self) -> bool:
        return self.candidates > 1 or self.guidance > 0


class Generation(Settings):
    """What is made in a round. The feedback of a round changes for the next what is marked ``Search``, here
    and in the generators' own settings, ``normals``, ``nearest`` and the generators' ``categories`` and
    ``texts``."""

    generators: dict[str, GeneratorSettings] = Field(
        default_factory=lambda: dict(DEFAULT_MIX), description="the mix; see `flawsmith doctor` for names"
    )
    preset: str | None = Field(
        None, description="start from a paper's training data: draem, dfd, onenip, cutpaste or nsa"
    )
    area: Annotated[AreaRange, Search(0.0003, 0.3, log=True)] = Field(
        (0.002, 0.08), description="wanted share of the picture, drawn log-uniformly"
    )
    severity: Annotated[UnitRange, Search(0, 1)] = Field(
        (0.2, 1.0), description="how strong, 0 barely visible, 1 strongest"
    )
    count: Annotated[CountRange, Search(1, 6, whole=True)] = Field(
        (1, 3), description="how many spots a sample has"
    )
    location: Annotated[
        Literal["anywhere", "foreground", "roi"], Search(choices=("anywhere", "foreground"))
    ] = Field("foreground", description="where: anywhere, on the part, or in the source's region of interest")
    categories: Annotated[dict[str, Share], Search(0.2, 5, log=True)] = Field(
        default_factory=dict, description="how often a category is drawn; 1 if not named"
    )
    normals: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="how often a normal picture is drawn, by image_id; 1 if not named. Feedback names "
        "the hard ones: where the detector raises false alarms",
    )
    nearest: dict[str, str] = Field(
        default_factory=dict,
        description="the generator that draws a normal picture twice as often as others do, by image_id. "
        "Feedback names that whose anomalies look most like the false alarm there",
    )
    textures: str | None = Field(None, description="folder of texture pictures for params.texture: folder")
    attempts: int = Field(6, ge=1, le=100, description="draws of one recipe before it is rejected")
    gates: Gates = Gates()
    practice: Practice = Practice()

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        """The preset's section, with what is set beside it in its place."""
        name = given.get("preset") if isinstance(given, dict) else None
        if name is None:
            return given
        known = yaml.safe_load(resources.files("workflows").joinpath("presets.yaml").read_text("utf-8"))
        if name not in known:
            raise ValueError(f"preset: unknown {name!r}; known: {', '.join(known)}")
        gates = given.get("gates") or {}
        if isinstance(gates, dict):
            gates = {**known[name]["gates"], **gates}
        return {**known[name], **given, "gates": gates}


def walltime_seconds(value: str) -> int:
    """Of ``MM:SS``, ``H:MM:SS`` and ``D-HH:MM:SS``, as SLURM writes them.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d\d)", value)
    if found is None:
        raise ValueError("write H:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(group or 0) for group in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _written(value: Any) -> Any:
    """YAML reads an unquoted 2:00:00 as a number to the base of 60."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value // 3600}:{value // 60 % 60:02d}:{value % 60:02d}"
    return value


def _long_enough(value: str) -> str:
    if walltime_seconds(value) < 300:
        raise ValueError("under 5 minutes, workers have no time to make a shard and leave; write H:MM:SS")
    return value


def _bytes(value: str) -> str:
    from dask.utils import parse_bytes

    try:
        parse_bytes(value)
    except ValueError as error:
        raise ValueError("no number of bytes; write e.g. 4GB") from error
    return value


def _bytes_or_auto(value: str) -> str:
    return value if value == "auto" else _bytes(value)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


JobsRange = Annotated[
    tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]],
    BeforeValidator(_pair),
    AfterValidator(ordered),
]
Walltime = Annotated[str, BeforeValidator(_written), AfterValidator(_long_enough)]


class Output(Settings):
    """How shards are written."""

    shard_size: int = Field(128, ge=1, le=100_000, description="samples a shard")
    format: Literal["webp", "png", "jpg"] = Field("webp", description="webp and png are lossless")
    bits: Literal[8, 16] = Field(8, description="16 needs format: png")
    max_side: int | None = Field(1024, ge=32, description="larger pictures are shrunk to this; null: never")
    normals: bool = Field(True, description="write the untouched picture beside each sample")


class Tls(Settings):
    """PEM files of an encrypted scheduler: as `dask scheduler --tls-ca-file … --tls-cert … --tls-key …`."""

    ca: str = Field(description="certificate of the authority that signed the scheduler's and the workers'")
    cert: str = Field(description="this client's certificate")
    key: str = Field(description="its private key")


class Slurm(Settings):
    """Jobs that dask-jobqueue submits. Each holds ``cores`` single-threaded workers, or with ``gpu`` one
    worker of as many threads, which has the GPU to itself."""

    cores: int = Field(ge=1, description="of a job")
    memory: Annotated[str, AfterValidator(_bytes)] = Field(description="of a job, e.g. 32GB")
    walltime: Walltime = Field(description="of a job, H:MM:SS or D-HH:MM:SS; 5 minutes at least")
    jobs: JobsRange = Field((1, 1), description="jobs kept running, or [fewest, most] as work demands")
    queue: str | None = Field(None, description="partition")
    account: str | None = None
    gpu: bool = Field(False, description="a GPU a job (--gres=gpu:1)")
    directives: tuple[str, ...] = Field((), description="further #SBATCH lines, e.g. --qos=long")
    prologue: tuple[str, ...] = Field(
        (), description="shell lines before the workers start, e.g. module load"
    )
    interface: str | None = Field(None, description="network interface of scheduler and workers, e.g. ib0")

    @property
    def seconds(self) -> int:
        return walltime_seconds(self.walltime)


class Cluster(Settings):
    """Where shards are made: on this machine, by a running scheduler (``address``) or in jobs (``slurm``).
    Changing this never changes a round of which something was made, so a workspace accepts any. Settled by it
    before that, and stored: the batch of ``cut`` that fits the memory and, with a walltime, the samples a
    shard."""

    workers: int | None = Field(None, ge=1, description="worker processes of this machine; null: one a core")
    threads: int = Field(1, ge=1, description="shards a worker of this machine makes at a time")
    memory_limit: Annotated[str, AfterValidator(_bytes_or_auto)] = Field(
        "auto", description="of a worker of this machine, e.g. 4GB"
    )
    address: str | None = Field(None, description="a running scheduler: tcp://host:8786 or tls://host:8786")
    tls: Tls | None = Field(None, description="certificates for a tls:// address")
    slurm: Slurm | None = Field(None, description="submit jobs to SLURM")
    time_limit: float | None = Field(
        3600, gt=0, description="seconds after which a shard is given up as hung; null: never"
    )

    @model_validator(mode="after")
    def _one_place(self) -> Cluster:
        if self.address and self.slurm:
            raise ValueError("address and slurm exclude each other: name a running scheduler or jobs")
        if self.tls and not (self.address or "").startswith("tls://"):
            raise ValueError(f"tls needs an address that begins with tls://, found {self.address!r}")
        if (self.address or "").startswith("tls://") and not self.tls:
            raise ValueError("an address that begins with tls:// needs tls: {ca: …, cert: …, key: …}")
        return self


class Detector(Settings):
    name: str = "residual"
    preset: str | None = Field(None, description="published settings to start from, e.g. paper")
    settings: dict[str, Any] = Field(default_factory=dict, description="the detector's own settings")
    tiles: float | None = Field(
        None,
        ge=0,
        le=0.75,
        description="learn and score pictures larger than the input in tiles of its size, neighbours sharing "
        "this much of a side; null: whole pictures, resized",
    )

    def resolved(self) -> tuple[Method, DetectorSettings]:
        """The method and its settings: its defaults, then the preset, then ``settings``.

        Raises:
            UsageError: no such detector or preset.
            pydantic.ValidationError: a setting is unknown or wrong.
        """
        from detectors import protocol

        method = protocol.get(self.name)
        if self.preset is not None and self.preset not in method.presets:
            known = ", ".join(method.presets) or "none"
            raise UsageError(f"no preset {self.preset!r}; {self.name} has {known}")
        preset = method.presets[self.preset] if self.preset is not None else {}
        return method, method.settings.model_validate({**preset, **self.settings})


class Training(Settings):
    """The mix that a round's detector learns from. A sample's weight is how often it is drawn, relative to
    another: with the defaults, all samples of this round and of the earlier ones come equally often."""

    earlier: float = Field(
        1.0,
        ge=0,
        le=1,
        description="weight of the previous round's samples, where this round's have 1; its square for the "
        "round before that, and so on; 0: this round only",
    )
    generators: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="weights of generators' samples; 1 if not named; 0 leaves them out"
    )
    weigh: bool = Field(
        False,
        description="learn weights of up to 600 samples from the masked anomalies of the feedback split",
    )


class Evaluation(Settings):
    resamples: int = Field(300, ge=0, le=10_000, description="bootstrap resamples behind each interval")
    quantile: float = Field(0.99, gt=0, lt=1, description="of calibration normals: the alarm threshold")


FEWEST_TRIALS = 16


class Feedback(Settings):
    trials: int = Field(
        32,
        ge=0,
        le=1000,
        description="of the cheap proxy inside a round, 16 or more; 0: no search, the rest of the feedback "
        "alone",
    )
    patience: int | None = Field(
        3, ge=1, description="rounds without a significant gain after which a run stops; null: never"
    )
    minutes: float | None = Field(
        None, gt=0, description="that a run's stages may take together; then no further round begins"
    )
    enabled: bool = Field(True, description="false: every round keeps the settings of the first")

    @field_validator("trials")
    @classmethod
    def _enough_or_none(cls, trials: int) -> int:
        if 0 < trials < FEWEST_TRIALS:
            raise ValueError(f"fewer than {FEWEST_TRIALS} find nothing; 0 turns the search off")
        return trials


class Config(Settings):
    source: tuple[SourceSettings, ...] = Field(description="a path, or a list of sources with their settings")
    samples: int = Field(300, ge=1, description="recipes a round")
    rounds: int = Field(2, ge=1, le=1000)
    seed: int = Field(0, ge=0, lt=2**63)
    shots: int | None = Field(
        None, ge=1, description="normals of each category to use at all, chosen by seed; null: every one"
    )
    generation: Generation = Generation()
    output: Output = Output()
    detector: Detector = Detector()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    feedback: Feedback = Feedback()
    cluster: Cluster = Cluster()

    @field_validator("source", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        items = value if isinstance(value, (list, tuple)) else [value]
        if not items:
            raise ValueError("names no source: give a folder of pictures")
        return [{"path": item} if isinstance(item, str) else item for item in items]

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is made: all but when the rounds end and on which machines."""
        ends = {"patience": True, "minutes": True}
        return self.model_dump(mode="json", exclude={"rounds": True, "cluster": True, "feedback": ends})


def load_config(path: str | Path) -> Config:
    """Reads and checks a file. Relative paths in it are relative to its folder.

    Raises:
        UsageError: the file is missing or no YAML, or a setting is unknown or wrong; every problem at once.
    """
    path = Path(path)
    try:
        raw = from_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; write it, e.g. `source: FOLDER` on one line") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {error}") from error
    return parse_config(raw, name=str(path), folder=path.parent.absolute())


def parse_config(raw: Any, *, name: str, folder: Path | None = None) -> Config:
    """A mapping to a checked configuration; see :func:`load_config`."""
    if not isinstance(raw, dict):
        raise UsageError(f"{name} must be a mapping such as `source: FOLDER`, found {type(raw).__name__}")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise UsageError(explain(error, raw, name)) from None
    problems = _check(config)
    if problems:
        raise UsageError("\n".join(f"{name}: {problem}" for problem in problems))
    resolved = _as_detector_looks(_resolve(config, folder) if folder is not None else config)
    problems = _check_prompts(resolved)
    if problems:
        raise UsageError("\n".join(f"{name}: {problem}" for problem in problems))
    return resolved


LOOKED_AT = ("backbone", "layers", "size")  # params of the generators that change features


def _as_detector_looks(config: Config) -> Config:
    """With the generators that change features set to those that the detector looks at, where they name none
    themselves. The detector is imported for their sake alone."""
    from generation import registry

    given = config.generation.generators
    bare = {
        name: settings
        for name, settings in given.items()
        if registry.get(name).family == "feature" and not set(LOOKED_AT) & set(settings.params)
    }
    if not bare:
        return config
    try:
        method, settings = config.detector.resolved()
    except (UsageError, ValidationError):  # told by check_detector
        return config
    if method.features is None:
        return config
    looked_at = {name: value for name, value in method.features(settings).items() if value is not None}
    generators = {
        name: own.model_copy(update={"params": {**own.params, **looked_at}}) for name, own in bare.items()
    }
    generation = config.generation.model_copy(update={"generators": {**given, **generators}})
    return config.model_copy(update={"generation": generation})


def at_scheduler(cluster: Cluster, address: str) -> Cluster:
    """The same with a running scheduler in place of what it names (``--scheduler``).

    Raises:
        UsageError: the address asks for certificates that the configuration does not name.
    """
    changed: dict[str, Any] = {"address": address, "slurm": None}
    if not address.startswith("tls://"):
        changed["tls"] = None
    try:
        return Cluster.model_validate({**cluster.model_dump(), **changed})
    except ValidationError as error:
        raise UsageError(f"--scheduler {address}: {error.errors()[0]['msg']}") from None


def _check(config: Config) -> list[str]:
    """What types alone cannot say: known names, and settings that need each other."""
    from generation import registry

    problems = []
    generators = {}
    for key, settings in config.generation.generators.items():
        try:
            generator = registry.get(key)
        except UsageError as error:
            problems.append(f"generation.generators: {error}")
            continue
        generators[key] = generator
        try:
            generator.params.model_validate(settings.params)
        except ValidationError as error:
            problems.append(
                explain(error, settings.params, f"generation.generators.{key}.params", generator.params)
            )
    if not config.generation.generators:
        problems.append("generation.generators: names none; leave it out for the default mix")
    if generators and not any(s.share > 0 for s in config.generation.generators.values()):
        problems.append("generation.generators: no generator has a share above 0")
    for key in config.training.generators:
        try:
            registry.get(key)
        except UsageError as error:
            problems.append(f"training.generators: {error}")
    if config.output.bits == 16 and config.output.format != "png":
        problems.append(f"output.bits: 16 needs output.format: png, found {config.output.format}")
    if config.generation.location == "roi":
        bare = [source.path for source in config.source if not source.roi]
        problems += [f"generation.location: roi, but source {path} names none (roi)" for path in bare]
    return problems


def _check_prompts(config: Config) -> list[str]:
    """What is wrong with the prompt banks that generators name; after their paths are known."""
    from generation import registry

    problems = []
    for key, settings in config.generation.generators.items():
        generator = registry.get(key)
        if generator.prompts is not None:
            try:
                bank = generator.prompts(generator.params.model_validate(settings.params), settings)
            except UsageError as error:
                problems.append(f"generation.generators.{key}: {error}")
                continue
            texts = [text for entry in bank.entries for text in (*entry.prompts, *entry.details)]
            for field, known in (("defects", [entry.defect for entry in bank.entries]), ("texts", texts)):
                for name in getattr(settings, field):
                    if name not in known:
                        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                        problems.append(
                            f"generation.generators.{key}.{field}: the prompt bank has no {name!r}; did you "
                            f"mean {near[0]!r}?"
                        )
        elif settings.defects or settings.texts:
            problems.append(
                f"generation.generators.{key}: it has no prompt bank: remove `defects` and `texts`"
            )
    return problems


def check_detector(config: Config, name: str) -> None:
    """Checks the detector's settings. Apart from the rest, because it imports torch, which planning and
    making samples do without.

    Raises:
        UsageError: the detector, its preset or one of its settings is not known.
    """
    from detectors import protocol

    try:
        _, settings = config.detector.resolved()
    except UsageError as error:
        raise UsageError(f"{name}: detector: {error}") from None
    except ValidationError as error:
        known = protocol.get(config.detector.name).settings
        raise UsageError(
            explain(error, config.detector.settings, f"{name}: detector.settings", known)
        ) from None
    if config.detector.tiles is not None and settings.leak is not None:
        raise UsageError(
            f"{name}: detector.tiles: the scores of a picture's tiles would depend on each other, for "
            f"{settings.leak}: set tiles to null, or change that setting"
        )
    _check_features(config, name)


def _check_features(config: Config, name: str) -> None:
    """Whether the detector can learn from the samples of features that are to be made.

    Raises:
        UsageError: it cannot, and the configuration does not leave them out of training.
    """
    from generation import registry

    method, settings = config.detector.resolved()
    looked_at = method.features(settings) if method.features is not None else None
    for key, own in config.generation.generators.items():
        generator = registry.get(key)
        if generator.family != "feature" or own.share == 0 or config.training.generators.get(key) == 0:
            continue
        leave = f"or leave its samples out of training: training.generators.{key}: 0"
        if looked_at is None:
            raise UsageError(
                f"{name}: generation.generators.{key}: makes samples of a backbone's features, from which "
                f"{method.name} cannot learn: set detector.name to onenip, {leave}"
            )
        params = generator.params.model_validate(own.params)
        differ = [n for n in LOOKED_AT if getattr(params, n) != looked_at.get(n)]
        if differ and _looked_at(params.model_dump()) != _looked_at(looked_at):
            raise UsageError(
                f"{name}: generation.generators.{key}.params: {', '.join(differ)}: other features than "
                f"{method.name} looks at: name none of {', '.join(LOOKED_AT)}, {leave}"
            )


def _looked_at(given: dict[str, Any]) -> tuple[str, int]:
    """The features that settings of :data:`LOOKED_AT` stand for: a backbone's fingerprint, and the size."""
    from generation.backbones import load_backbone

    return load_backbone(given["backbone"], given["layers"]).fingerprint, given["size"]


def _resolve(config: Config, folder: Path) -> Config:
    from generation import registry
    from generation.protocol import PATH

    def absolute(value: str | None) -> str | None:
        if value is None or "://" in value:
            return value
        return str((folder / Path(value).expanduser()).absolute())

    sources = tuple(
        source.model_copy(
            update={name: absolute(getattr(source, name)) for name in ("path", "roi", "ignore")}
        )
        for source in config.source
    )

    def placed(key: str, settings: GeneratorSettings) -> GeneratorSettings:
        fields = registry.get(key).params.model_fields
        paths = {
            name: absolute(settings.params[name])
            for name, field in fields.items()
            if field.json_schema_extra == PATH and name in settings.params
        }
        return settings.model_copy(update={"params": {**settings.params, **paths}}) if paths else settings

    generators = {key: placed(key, settings) for key, settings in config.generation.generators.items()}
    generation = config.generation.model_copy(
        update={"textures": absolute(config.generation.textures), "generators": generators}
    )
    tls = config.cluster.tls
    if tls is not None:
        tls = tls.model_copy(update={name: absolute(path) for name, path in tls})
    cluster = config.cluster.model_copy(update={"tls": tls})
    return config.model_copy(update={"source": sources, "generation": generation, "cluster": cluster})


def explain(error: ValidationError, raw: Any, name: str, model: type[BaseModel] = Config) -> str:
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            lines.append(f"{name}: {place}: no such setting; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{name}: {place}: is missing; add it")
        else:
            found = f", found {item['input']!r}" if not isinstance(item["input"], dict) else ""
            lines.append(f"{name}: {place}: {item['msg'].removeprefix('Value error, ')}{found}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the settings at one place of the tree; ``loc`` also steps through lists and mappings."""
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            found = _model_in(model.model_fields[part].annotation)
            if found is None:
                return []
            model = found
    return sorted(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def to_yaml(config: BaseModel) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def own_settings(config: Config) -> str:
    """The settings of the detector and of each generator, as they stand, as comments of YAML: written out
    as values they would make another configuration of the same run."""
    from generation import registry

    method, detector = config.detector.resolved()
    sections: list[tuple[str, BaseModel]] = [(f"detector.settings of {method.name}", detector)]
    for name, own in config.generation.generators.items():
        sections.append(
            (f"generation.generators.{name}.params", registry.get(name).params.model_validate(own.params))
        )
    lines = []
    for title, settings in sections:
        lines += ["#", f"# {title}:"]
        for field, value in settings.model_dump(mode="json").items():
            told = type(settings).model_fields[field].description
            shown = json.dumps(value, ensure_ascii=False)  # which YAML reads too
            lines.append(f"#   {field}: {shown}" + (f"  # {told}" if told else ""))
    return "\n".join(lines) + "\n"


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """``place: old → new`` for every leaf in which two settings trees differ."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in [*old, *(k for k in new if k not in old)]
            for line in differences(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
        ]
    return [] if old == new else [f"{place}: {old!r} → {new!r}"]
