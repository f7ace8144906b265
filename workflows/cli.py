"""The command ``flawsmith``. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from manifests.errors import FlawsmithError, ReadOnlyError, UsageError

if TYPE_CHECKING:
    from manifests.workspace import Workspace
    from workflows.config import Config

OK, FAILED, USAGE, PARTIAL = 0, 1, 2, 3
INTERRUPTED = 130  # Typer's own exit code after Ctrl-C, which says nothing

app = typer.Typer(
    help="Makes the defects an inspection line has not seen yet, trains detectors from them, judges those on "
    "real defects, and lets what they miss decide what is made next.\n\n"
    "Start with `flawsmith inspect FOLDER`, then `flawsmith run config.yaml --workspace DIR`.\n\n"
    "Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 done in part.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Check a configuration, or show it with every default.", no_args_is_help=True)
app.add_typer(config_app, name="config")
pocket_app = typer.Typer(
    help="The small models that are shipped for machines without a hub.", no_args_is_help=True
)
app.add_typer(pocket_app, name="pocket")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; `source: FOLDER` is enough")]
WorkspaceOption = Annotated[
    str, typer.Option("--workspace", "-w", metavar="DIR", help="folder or fsspec URL that holds the results")
]
WorkspaceArgument = Annotated[str, typer.Argument(metavar="WORKSPACE", help="folder or fsspec URL of a run")]
RoundsOption = Annotated[
    int | None, typer.Option("--round", min=0, help="which round; default: all", show_default=False)
]
SchedulerOption = Annotated[
    str | None, typer.Option(metavar="URL", help="a running Dask scheduler, e.g. tcp://host:8786")
]
RoundOption = Annotated[
    int | None, typer.Option("--round", min=0, help="which round; default: the latest", show_default=False)
]
RoiOption = Annotated[
    Path | None,
    typer.Option(
        metavar="MASK", help="region of interest: a mask, or a folder with <stem>.png of every picture"
    ),
]
IgnoreOption = Annotated[Path | None, typer.Option(metavar="MASK", help="places that do not count: likewise")]
CategoryOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="of the pictures of --data; default: their folder's name")
]


@app.command(epilog="Examples: flawsmith inspect pictures/bottle | flawsmith inspect list.csv --layout list")
def inspect(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="folder, list, shards, or a configuration (.yaml)")
    ],
    layout: Annotated[str, typer.Option(help="auto, mvtec, folder, list or webdataset")] = "auto",
) -> None:
    """Read every picture of a source and list every problem at once; exit code 2 if a run could not go on."""
    from collections import Counter

    from workflows.config import load_config, parse_config
    from workflows.rounds import read_sources

    if source.endswith((".yaml", ".yml")):
        config = load_config(source)
    else:
        config = parse_config(
            {"source": {"path": source, "layout": layout}}, name="inspect", folder=Path.cwd()
        )
    found = read_sources(config, [])
    counts = Counter((image.category, image.split, image.defect) for image in found.images)
    for (category, split, defect), count in sorted(counts.items()):
        typer.echo(f"{category:<28} {split:<12} {defect:<20} {count:>6}")
    for problem in found.problems:
        typer.echo(f"{problem.level}: {problem.path}: {problem.what}; {problem.remedy}")
    errors = sum(problem.level == "error" for problem in found.problems)
    typer.echo(
        f"{len(found.images)} pictures usable, {errors} errors, {len(found.problems) - errors} warnings"
        + ("; a run could not go on" if found.fatal else "")
    )
    raise typer.Exit(USAGE if found.fatal else OK)


@app.command(
    epilog="Examples: flawsmith run config.yaml -w runs/bottle | flawsmith run config.yaml -w runs/bottle "
    "--dry-run | flawsmith run config.yaml -w runs/bottle --scheduler tcp://host:8786"
)
def run(
    config: ConfigPath,
    workspace: WorkspaceOption,
    rounds: Annotated[int | None, typer.Option(min=1, help="overrides the configuration's rounds")] = None,
    scheduler: SchedulerOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="estimate only; nothing is written")] = False,
    new_round: Annotated[
        bool, typer.Option("--new-round", help="the settings changed: start a round with them")
    ] = False,
) -> None:
    """Everything: samples, detector, figures, and the next round's settings. Goes on where it stopped."""
    from workflows.config import check_detector

    settings = _configure(config, rounds, scheduler)  # before what takes seconds to import
    check_detector(settings, str(config))
    if dry_run:
        from workflows.upkeep import estimate

        typer.echo(estimate(settings))
        return
    from workflows.loop import run as run_loop

    run_loop(settings, _workspace(workspace), new_round=new_round)


@app.command(epilog="Example: flawsmith plan config.yaml -w runs/bottle")
def plan(
    config: ConfigPath,
    workspace: WorkspaceOption,
    new_round: Annotated[
        bool, typer.Option("--new-round", help="start a round with changed settings")
    ] = False,
) -> None:
    """Write the recipes of the latest round; nothing is made."""
    settings, space = _configure(config), _workspace(workspace)
    from workflows import rounds

    with space.writing():
        number = rounds.begin(settings, space, new_round=new_round)
        typer.echo(f"round {number}: {rounds.plan(space, number)} recipes")


@app.command(epilog="Example: flawsmith generate config.yaml -w runs/bottle --scheduler tcp://host:8786")
def generate(config: ConfigPath, workspace: WorkspaceOption, scheduler: SchedulerOption = None) -> None:
    """Make the samples of the latest round that are not there yet."""
    settings, space = _configure(config, scheduler=scheduler), _workspace(workspace)
    from workflows import rounds
    from workflows.loop import make_samples

    with space.writing():
        number = rounds.begin(settings, space, new_round=False)
        make_samples(space, number, settings.cluster)


@app.command(
    epilog="Examples: flawsmith train runs/bottle | accelerate launch --num_processes 4 -m workflows.cli "
    "train runs/bottle"
)
def train(workspace: WorkspaceArgument, round_: RoundOption = None) -> None:
    """Train the detector on a round's samples. Goes on where it was broken off.

    On several GPUs, or several processes, it is started by `accelerate launch`, as in the second example.
    """
    from training.fitting import processes
    from workflows import detecting
    from workflows.loop import timed

    space = _existing(workspace)
    number = _round(space, round_)
    if processes()[0] > 0:  # the first process alone writes
        detecting.train(space, number)
        return
    with space.writing():
        timed(space, number, "train", lambda: detecting.train(space, number))


@app.command(
    epilog="Examples: flawsmith evaluate runs/bottle | flawsmith evaluate runs/bottle --stress | "
    "flawsmith evaluate runs/bottle --final | flawsmith evaluate runs/bottle --data pictures/flask "
    "--category bottle"
)
def evaluate(
    workspace: WorkspaceArgument,
    round_: RoundOption = None,
    final: Annotated[
        bool, typer.Option("--final", help="score the test split, once, for every round")
    ] = False,
    stress: Annotated[
        bool, typer.Option("--stress", help="also with other viewpoints, uneven light and blur")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="pictures in MVTec AD layout, in place of the feedback pictures"),
    ] = None,
    roi: RoiOption = None,
    ignore: IgnoreOption = None,
    category: CategoryOption = None,
) -> None:
    """Judge a round's detector on the real feedback pictures, or every round on the test split (--final).

    With --data, on the test pictures of a folder: nothing is written. A category has its folder's name; where
    that is not the one that the detector was trained on, --category says it. `vlad` takes categories that it
    was not trained on (zero-shot); those that it was are left out then.
    """
    from workflows import detecting
    from workflows.loop import timed
    from workflows.tables import alarms_lines, figures_table, stress_table

    if final and stress:
        raise UsageError("--stress and --final: the test split is scored as it is; name one of them")
    if data is not None and (final or stress):
        raise UsageError("--data: its pictures are scored as they are; leave out --final and --stress")
    _refuse_without_data(data, roi, ignore, category)
    space = _existing(workspace)
    if data is not None:
        from workflows.comparing import evaluate_on
        from workflows.tables import categories_table

        number = _round(space, round_)
        rows = evaluate_on(detecting.trained(space, number), data, roi=roi, ignore=ignore, category=category)
        table = categories_table("round", {str(number): rows})
        typer.echo(table or f"no figures: {data} has no masks and no good picture under test")
        return
    split = "test" if final else "feedback"
    with space.writing():
        if final:
            detecting.evaluate_final(space)
        else:
            number = _round(space, round_)
            timed(space, number, "evaluate", lambda: detecting.evaluate(space, number))
        typer.echo(figures_table(space, split))
        typer.echo(alarms_lines(space, split))
        if stress:
            from workflows.stressing import stress as under_stress

            typer.echo(stress_table(under_stress(space, _round(space, round_))))


@app.command(
    epilog="Examples: flawsmith compare runs/bottle/rounds/000/detectors/residual "
    "runs/bottle/rounds/001/detectors/residual | flawsmith compare A B --data pictures/bottle"
)
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="folder or URL of a trained detector")],
    second: Annotated[str, typer.Argument(metavar="B", help="another, of the same categories")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="pictures in MVTec AD layout; default: A's feedback pictures"),
    ] = None,
    roi: RoiOption = None,
    ignore: IgnoreOption = None,
    category: CategoryOption = None,
) -> None:
    """Is B better than A, at what? Differences on the same pictures, of all defects of a category, of each
    defect type and of each size, their intervals, and p values of paired tests."""
    from workflows.comparing import compare as compare_checkpoints
    from workflows.tables import comparison_table, parts_table

    _refuse_without_data(data, roi, ignore, category)
    rows = compare_checkpoints(first, second, data, roi=roi, ignore=ignore, category=category)
    typer.echo(comparison_table(rows))
    typer.echo("p: image_auroc by DeLong's test, the rest by resampling groups; Holm over the categories\n")
    if not (parts := parts_table(rows)):
        return
    typer.echo(parts)
    typer.echo(
        "A's figure, B − A, its 95 % interval; *: p < 5 % after Holm over all defect types, or all sizes "
        "(tiny: under 0.1 % of the picture, small: under 1 %); no interval: under five good parts, or parts "
        "with such defects"
    )


@app.command(epilog="Examples: flawsmith feedback runs/bottle | flawsmith feedback runs/bottle --explain")
def feedback(
    workspace: WorkspaceArgument,
    round_: RoundOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="print the stored decisions only")] = False,
) -> None:
    """Decide the next round's settings from a round's figures."""
    from workflows import steering
    from workflows.loop import timed

    space = _existing(workspace)
    number = _round(space, round_)
    if not explain:
        with space.writing():
            timed(space, number, "feedback", lambda: steering.feedback(space, number))
    typer.echo(steering.explain(space, number))


@app.command(
    epilog="Examples: flawsmith verify runs/bottle && echo whole | flawsmith verify --sweep runs/bottle"
)
def verify(
    workspace: WorkspaceArgument,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="remove what killed writers left and no planned shard has")
    ] = False,
) -> None:
    """Read every shard, table and detector and name what is truncated, damaged, missing or extra; `run` makes
    shards and detectors again."""
    from workflows.upkeep import verify as verify_workspace

    space = _existing(workspace)
    try:
        with space.writing():
            findings = verify_workspace(space, sweep=sweep)
    except ReadOnlyError:
        if sweep:
            raise
        typer.echo("the workspace cannot be written to: what is damaged is listed here alone", err=True)
        findings = verify_workspace(space, note=False)
    for finding in findings:
        typer.echo(f"{finding.path}: {finding.what}")
    typer.echo(
        f"{len(findings)} problems; `flawsmith run` with the same configuration makes shards, detectors and "
        "figures again; restore or remove another table"
        if findings
        else "every shard is whole"
    )
    raise typer.Exit(FAILED if findings else OK)


@app.command(epilog="Example: flawsmith show runs/bottle --out contact.png")
def show(
    workspace: WorkspaceArgument,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("contact.png"),
    samples: Annotated[int, typer.Option(min=1, max=500, help="how many")] = 24,
    round_: RoundsOption = None,
) -> None:
    """Write a contact sheet: picture with mask outline, mask, normal, caption."""
    from workflows.contact import contact_sheet

    space = _existing(workspace)
    shown = contact_sheet(space, out, rounds=None if round_ is None else [round_], samples=samples)
    typer.echo(f"{out}: {len(shown)} samples")


@app.command(epilog="Examples: flawsmith report runs/bottle | flawsmith report runs/bottle --no-pictures")
def report(
    workspace: WorkspaceArgument,
    no_pictures: Annotated[
        bool,
        typer.Option("--no-pictures", help="for a page that may leave the house: no pictures, no file paths"),
    ] = False,
) -> None:
    """Write report/index.html, one page without a network: rounds, defects, samples, rejections, cost."""
    from workflows.report.page import write_report

    space = _existing(workspace)
    with space.writing():
        name = write_report(space, with_pictures=not no_pictures)
    typer.echo(f"{space.address(name)}: {(space.size(name) or 0) / 1e6:.1f} MB")


@app.command(
    epilog="Examples: flawsmith review runs/bottle --reject 000-00001-00042 | flawsmith review runs/bottle "
    "--from rejected.txt | flawsmith review runs/bottle --restore 000-00001-00042"
)
def review(
    workspace: WorkspaceArgument,
    reject: Annotated[list[str] | None, typer.Option(metavar="ID", help="a sample to reject")] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="a file with one id to reject a line")
    ] = None,
    restore: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="a rejected sample to take back")
    ] = None,
) -> None:
    """Reject samples by hand: training, export and contact sheets leave them out."""
    from workflows.upkeep import review as change_vetoes

    ids = list(reject or [])
    if from_ is not None:
        try:
            ids += [line.strip() for line in from_.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise UsageError(f"--from {from_}: {error.strerror}") from error
    if not ids and not restore:
        raise UsageError("name samples with --reject ID, --from FILE or --restore ID")
    space = _existing(workspace)
    with space.writing():
        typer.echo(change_vetoes(space, ids, restore or []))


@app.command(epilog="Example: flawsmith replay runs/bottle 000-00001-00042")
def replay(
    workspace: WorkspaceArgument,
    sample_id: Annotated[str, typer.Argument(metavar="SAMPLE_ID", help="as in the shards and captions")],
) -> None:
    """Make a sample again from its recipe and compare the bytes."""
    from workflows.replaying import replay as replay_sample

    result = replay_sample(_existing(workspace), sample_id)
    if result["identical"]:
        typer.echo(f"{sample_id}: the same bytes as in {result['path']}")
        return
    typer.echo(
        f"{sample_id}: differs from {result['path']} in {', '.join(result['members']) or 'its checksum'}: "
        f"{result['differ']} pixels or tokens, by {result['largest']:g} at most; see `fingerprint` in "
        "shards.parquet for the versions that made it"
    )
    raise typer.Exit(FAILED)


@app.command(epilog="Example: flawsmith export runs/bottle out/ --format mvtec")
def export(
    workspace: WorkspaceArgument,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="new or empty folder")],
    format_: Annotated[str, typer.Option("--format", help="mvtec, coco or yolo")] = "mvtec",
    round_: RoundsOption = None,
) -> None:
    """Write pictures and masks as files that other tools read."""
    from workflows.export import export as export_samples

    counts = export_samples(_existing(workspace), format_, out, rounds=None if round_ is None else [round_])
    typer.echo(f"{out}: {counts}")


@app.command(
    epilog="Examples: flawsmith predict runs/bottle/rounds/001/detectors/residual new/*.png --out found | "
    "flawsmith predict bottle.onnx new --roi roi.png --out found"
)
def predict(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="folder or URL of a trained detector, or an exported .onnx"
        ),
    ],
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURES", help="files or folders")],
    out: Annotated[Path, typer.Option(help="folder for scores and heat maps")] = Path("predictions"),
    category: Annotated[
        str | None, typer.Option(help="of the pictures, if the detector knows several: its threshold decides")
    ] = None,
    roi: RoiOption = None,
    ignore: IgnoreOption = None,
) -> None:
    """Score pictures with a trained detector; writes scores.csv, scores.json, heat maps and raw maps.

    Goes on where it stopped. Pictures that cannot be read are named; the others are scored (exit code 3).
    """
    from manifests.layouts import shown
    from workflows.predict import predict as predict_pictures

    rows = predict_pictures(checkpoint, pictures, out, category=category, roi=roi, ignore=ignore)
    failed = [row for row in rows if row.get("error")]
    for row in rows:
        said = row.get("error") or f"{row['score']:.4f} {'ANOMALOUS' if row['anomalous'] else 'good'}"
        typer.echo(shown(f"{row['path']}: {said.removeprefix(row['path'] + ': ')}"))
    raise typer.Exit(PARTIAL if failed and len(failed) < len(rows) else FAILED if failed else OK)


@app.command(
    "export-model",
    epilog="Example: flawsmith export-model runs/bottle/rounds/001/detectors/residual --out bottle.onnx",
)
def export_model(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="folder or URL of a trained detector")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="to write: .onnx, or .pt2 for torch-export")],
    format_: Annotated[str, typer.Option("--format", help="onnx or torch-export")] = "onnx",
    category: Annotated[
        str | None, typer.Option(help="whose threshold decides, if the detector knows several")
    ] = None,
) -> None:
    """Write a trained detector as one file: decoded pictures of any size in; score, map and decision out."""
    from workflows.runtimes import export_model as export_graph

    facts = export_graph(checkpoint, out, format_, category)
    shape = "×".join(map(str, facts["input"]["shape"]))
    typer.echo(f"{out}: uint8 {shape} → {', '.join(facts['outputs'])}; threshold {facts['threshold']:.4f}")


@app.command(
    epilog="Example: flawsmith prompts bottle metal_nut --endpoint http://localhost:8000/v1 --model NAME "
    "--out prompts.json, then generation.generators.cut.params.bank: prompts.json"
)
def prompts(
    categories: Annotated[
        list[str], typer.Argument(metavar="CATEGORY...", help="as the pictures' source names them")
    ],
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="an OpenAI-compatible chat endpoint, e.g. http://host:8000/v1")
    ],
    model: Annotated[str, typer.Option(metavar="NAME", help="the language model, as the endpoint calls it")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="prompt bank to write (.json)")],
    api_key_env: Annotated[
        str | None, typer.Option(metavar="VAR", help="environment variable that holds the key")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for one answer")] = 120.0,
) -> None:
    """Let a language model write a prompt bank for your categories; everything it answers is checked."""
    from workflows.prompting import write_bank

    bank = write_bank(categories, endpoint, model, out, key_variable=api_key_env, timeout=timeout)
    typer.echo(f"{out}: {len(bank.entries)} entries for {len(set(categories))} categories")


@app.command(
    epilog="Examples: flawsmith gallery plate.png --out gallery.png | flawsmith gallery a.png b.png "
    "--generator band --generator peak --out gallery.html"
)
def gallery(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE…", help="pictures of good parts")],
    out: Annotated[Path, typer.Option(metavar="FILE", help=".png or .html")] = Path("gallery.png"),
    generator: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="only these; may be repeated")
    ] = None,
    area: Annotated[float, typer.Option(min=1e-5, max=0.5, help="wanted share of the picture")] = 0.03,
    seed: Annotated[int, typer.Option(min=0, help="another seed, other anomalies")] = 0,
) -> None:
    """Every generator at three severities on your pictures, on one page: to choose from."""
    from workflows.gallery import gallery as make

    typer.echo(make(pictures, out, names=generator or (), area=area, seed=seed))


@app.command(
    "try",
    epilog='Examples: flawsmith try plate.png --prompt "a photo of a steel plate with a scratch on it" | '
    'flawsmith try plate.png --prompt "a photo of a plate with scorch marks" --word "scorch marks" '
    "--mask where.png --set steps=30 --set guidance=8",
)
def try_(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="a picture of a good part")],
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='"a photo of a … with a …"; holds the word for the anomaly'),
    ] = None,
    detail: Annotated[str, typer.Option(metavar="TEXT", help="a longer description of the anomaly")] = "",
    normal: Annotated[
        str, typer.Option(metavar="TEXT", help="the good part; default: the prompt up to its anomaly")
    ] = "",
    word: Annotated[
        str, typer.Option(metavar="WORD", help="the anomaly in the prompt; default: the one that is known")
    ] = "",
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where the anomaly may be: what is not black")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Stable Diffusion 1.x or 2.x: pocket, folder or hub id")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(metavar="NAME", help="guides and judges: pocket, folder, MODEL/TAG, none")
    ] = None,
    area: Annotated[float, typer.Option(min=1e-5, max=0.5, help="wanted share of the picture")] = 0.02,
    severity: Annotated[float, typer.Option(min=0, max=1, help="0 barely visible, 1 strongest")] = 0.7,
    count: Annotated[int, typer.Option(min=1, max=32, help="how many spots")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="another seed, another anomaly")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="a setting of `cut`, as in params")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="default: PICTURE's name with -cut", show_default=False)
    ] = None,
) -> None:
    """One anomaly on one picture, drawn by a diffusion model: anomaly.png, mask.png and side_by_side.png.

    What an earlier try wrote in the folder is replaced; other files never are. A result that the gates of a
    run would reject is written all the same, and the line says which gate.
    """
    from workflows.trying import Wish, missing_prompt, parse_settings, try_picture

    if prompt is None or not prompt.strip():
        raise missing_prompt(picture)
    named: dict[str, str | None] = {"model": model} if model is not None else {}
    if clip is not None:
        named["clip"] = named["judge"] = clip if clip.lower() != "none" else None
    params = {**named, **parse_settings(set_ or [])}
    wish = Wish(prompt, detail, normal, word, area, severity, count, seed, params)
    typer.echo(try_picture(picture, wish, mask=mask, out=out))


@pocket_app.command("train", epilog="Example: flawsmith pocket train --out pocket --textures free-textures")
def pocket_train(
    out: Annotated[Path, typer.Option(metavar="DIR", help="for checkpoints and the finished sd/ and clip/")],
    textures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="free pictures of surfaces without defects")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of pictures and weights")] = 0,
) -> None:
    """Train the shipped models again, from pictures that code draws. Takes about five hours on two cores.

    Goes on where it stopped; finished parts are skipped.
    """
    from training.pocket.train import train_all

    sd, clip = train_all(out, textures, seed)
    typer.echo(f"{sd} and {clip}: name them as `model` and `clip` of the generator cut")


@config_app.command("check", epilog="Example: flawsmith config check config.yaml")
def config_check(config: ConfigPath) -> None:
    """Check a configuration; every problem is listed."""
    from workflows.config import check_detector

    check_detector(_configure(config), str(config))
    typer.echo(f"{config}: fine")


@config_app.command("show", epilog="Example: flawsmith config show config.yaml > full.yaml")
def config_show(config: ConfigPath) -> None:
    """Print a configuration with every default filled in; the detector's and generators' as comments."""
    from workflows.config import check_detector, own_settings, to_yaml

    found = _configure(config)
    check_detector(found, str(config))
    typer.echo(to_yaml(found) + own_settings(found), nl=False)


@app.command()
def doctor() -> None:
    """What works on this machine, one line each, with the remedy."""
    from workflows.doctor import checks

    results = checks()
    for check in results:
        sign = {True: "ok  ", False: "FAIL", None: "--  "}[check.ok]
        typer.echo(f"{sign} {check.name:<22} {check.found}" + (f"; {check.remedy}" if check.remedy else ""))
    raise typer.Exit(FAILED if any(check.ok is False for check in results) else OK)


@app.command(epilog="Example: flawsmith demo demo")
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="for pictures and results")] = Path("demo"),
) -> None:
    """The whole loop on real solar cells and drawn parts: two rounds, a quarter of an hour, no network."""
    from workflows.config import load_config
    from workflows.contact import contact_sheet
    from workflows.demo import write_demo
    from workflows.detecting import evaluate_final
    from workflows.loop import run as run_loop
    from workflows.report.page import write_report
    from workflows.tables import figures_table, licences, rounds_table

    config = write_demo(folder)
    space = _workspace(str(folder / "workspace"))
    run_loop(load_config(config), space, new_round=False)
    with space.writing():
        evaluate_final(space)
        report = write_report(space)
    sheet = folder / "contact.png"
    contact_sheet(space, sheet)
    typer.echo(rounds_table(space))
    typer.echo("\nFinal figures on the test split (read once):")
    typer.echo(figures_table(space, "test"))
    typer.echo(f"\nlicences: {licences(space)}")
    typer.echo(f"contact sheet: {sheet}\nreport: {space.address(report)}")


def _configure(path: Path, rounds: int | None = None, scheduler: str | None = None) -> Config:
    from workflows.config import at_scheduler, load_config

    config = load_config(path)
    if rounds is not None:
        config = config.model_copy(update={"rounds": rounds})
    if scheduler is not None:
        cluster = at_scheduler(config.cluster, scheduler)
        config = config.model_copy(update={"cluster": cluster})
    return config


def _workspace(url: str) -> Workspace:
    from manifests.workspace import Workspace

    return Workspace(url if "://" in url else str(Path(url).absolute()))


def _existing(url: str) -> Workspace:
    space = _workspace(url)
    if not space.rounds():
        raise UsageError(f"{url} is no workspace: `flawsmith run CONFIG --workspace DIR` makes one")
    return space


def _refuse_without_data(data: Path | None, *options: Path | str | None) -> None:
    if data is None and any(options):
        raise UsageError(
            "--roi, --ignore and --category are of the pictures of --data; a workspace has its own (roi, "
            "ignore and category of its source)"
        )


def _round(space: Workspace, number: int | None) -> int:
    rounds = space.rounds()
    if not rounds:
        raise UsageError(
            f"{space.address('')} is no workspace yet: `flawsmith run CONFIG --workspace DIR` makes one"
        )
    if number is None:
        return rounds[-1]
    if number not in rounds:
        raise UsageError(f"--round {number}: the workspace has the rounds {', '.join(map(str, rounds))}")
    return number


def main() -> NoReturn:
    """Runs the command and turns errors meant for the user into a message and an exit code."""
    try:
        app(standalone_mode=True)
    except FlawsmithError as error:
        typer.echo(f"flawsmith: {error}", err=True)
        if isinstance(error, UsageError):
            sys.exit(USAGE)
        sys.exit(PARTIAL if type(error).__name__ == "PartialResult" else FAILED)
    except OSError as error:
        remedy = "; make room and run the same command again" if error.errno == errno.ENOSPC else ""
        reason = error.strerror or str(error) or type(error).__name__
        typer.echo(f"flawsmith: {error.filename or 'writing'}: {reason}{remedy}", err=True)
        sys.exit(FAILED)
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED:
            raise
        typer.echo("flawsmith: interrupted; the same command goes on where it stopped", err=True)
        sys.exit(FAILED)
    sys.exit(OK)


if __name__ == "__main__":  # accelerate launch -m workflows.cli
    main()
