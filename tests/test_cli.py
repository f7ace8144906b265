"""Wrong input at the command line: a clear message, the right exit code, and nothing started."""

import io
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import cv2
import numpy as np
import pytest
import yaml

from manifests.workspace import Workspace
from tests.small_workspace import write_workspace
from workflows.config import load_config
from workflows.rounds import vetoes

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(p for p in (ROOT / "workflows").glob("*.yaml") if p.name != "presets.yaml")


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def flawsmith(*words: object) -> Done:
    """The command in this process: the same entry point, without importing torch anew each time."""
    from workflows.cli import main

    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["flawsmith", *map(str, words)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main()
    return Done(int(end.value.code or 0), out.getvalue(), err.getvalue())


def write_picture(path: Path, seed: int = 0, side: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def write_config(folder: Path, **settings) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"source": "parts", **settings}))
    return path


@pytest.fixture
def parts(tmp_path) -> Path:
    for seed in range(6):
        write_picture(tmp_path / "parts" / f"{seed}.png", seed)
    return tmp_path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path):
    assert load_config(path).rounds >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample": 3}, "sample: no such setting; did you mean 'samples'?"),
        ({"feedback": {"trials": 3}}, "fewer than 16 find nothing; 0 turns the search off"),
        ({"generation": {"arae": [0.1, 0.2]}}, "generation.arae: no such setting; did you mean 'area'?"),
        ({"generation": {"generators": {"perlim": {}}}}, "perlin"),
        ({"generation": {"generators": {"scar": {"params": {"colour": 1}}}}}, "scar.params: colour"),
        ({"generation": {"gates": {"leek_max": 1}}}, "did you mean 'leak_max'?"),
        ({"generation": {"area": [0.2, 0.1]}}, "upside down"),
        ({"generation": {"location": "roi"}}, "location: roi, but source"),
        ({"generation": {"generators": {}}}, "generation.generators: names none"),
        ({"generation": {"generators": {"scar": {"share": float("inf")}}}}, "generators.scar.share"),
        ({"cluster": {"memory_limit": "lots"}}, "cluster.memory_limit: no number of bytes; write e.g. 4GB"),
        ({"output": {"bits": 16}}, "needs output.format: png"),
        ({"detector": {"name": "onenib"}}, "onenip"),
        ({"detector": {"settings": {"stepz": 3}}}, "did you mean 'steps'?"),
        ({"samples": 0}, "samples"),
        ({"source": []}, "names no source"),
    ],
)
def test_a_wrong_setting_is_named_with_the_remedy(parts, settings, message):
    done = flawsmith("config", "check", write_config(parts, **settings))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_all_problems_of_a_configuration_are_listed_at_once(parts):
    config = write_config(parts, sample=3, generation={"arae": 1}, output={"formt": "png"})
    done = flawsmith("config", "check", config)
    assert [word in done.stderr for word in ("samples", "area", "format")] == [True] * 3


def test_three_lines_suffice_and_show_prints_the_rest(parts):
    done = flawsmith("config", "show", write_config(parts, samples=300, rounds=2))
    shown = yaml.safe_load(done.stdout)
    assert shown["source"][0]["path"] == str(parts / "parts")
    assert shown["generation"]["gates"] and shown["output"]["format"] == "webp"
    again = parts / "full.yaml"
    again.write_text(done.stdout)
    assert load_config(again) == load_config(parts / "config.yaml")
    for line in ("#   coreset: 1000  # ", "#   gaps: 0.5", "# detector.settings of residual:"):
        assert line in done.stdout, done.stdout
    wrong = write_config(parts, detector={"name": "residual", "settings": {"stepz": 3}})
    assert "did you mean 'steps'" in flawsmith("config", "show", wrong).stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("source: [unclosed", "cannot be read as YAML"),
        ("just words", "must be a mapping"),
        ("samples: 3", "source: is missing"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, words):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    done = flawsmith("run", path, "--workspace", tmp_path / "w")
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "w").exists()


def test_inspect_lists_every_problem_and_refuses_what_cannot_run(tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "empty.png").write_bytes(b"")
    (bad / "text.png").write_text("no picture")
    write_picture(bad / "tiny.png", side=1)
    done = flawsmith("inspect", bad)
    assert done.returncode == 2
    assert all(name in done.stdout for name in ("empty.png", "text.png", "tiny.png")), done.stdout
    write_picture(bad / "good.png")
    done = flawsmith("inspect", bad)
    assert (done.returncode, "3 errors" in done.stdout) == (0, True), done.stdout


def test_an_empty_source_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "parts").mkdir()
    done = flawsmith("run", write_config(tmp_path), "-w", tmp_path / "w")
    assert done.returncode == 2 and "parts" in done.stderr
    assert not list((tmp_path / "w").rglob("*.parquet"))


def test_other_settings_are_refused_with_the_difference(parts):
    small = {"samples": 4, "output": {"shard_size": 4}}
    config = write_config(parts, **small)
    done = flawsmith("plan", config, "-w", parts / "w")
    assert done.returncode == 0 and "4 recipes" in done.stdout, done.stderr
    write_config(parts, **small, seed=5)
    done = flawsmith("plan", config, "-w", parts / "w")
    assert done.returncode == 2
    assert "seed: 0 → 5" in done.stderr and "--new-round" in done.stderr
    done = flawsmith("plan", config, "-w", parts / "w", "--new-round")
    assert done.returncode == 0 and "round 1" in done.stdout


def test_one_picture_alone(tmp_path):
    """Nothing to take patches from: said in one line, with the setting that mends it."""
    write_picture(tmp_path / "parts" / "only.png")
    done = flawsmith("plan", write_config(tmp_path), "-w", tmp_path / "w")
    assert done.returncode == 2 and "poisson" in done.stderr
    assert "name the other generators, without it, under generation.generators" in done.stderr


def test_a_share_for_a_category_that_is_not_there_is_refused(parts):
    for generation, setting in (
        ({"categories": {"partz": 0}}, "generation.categories"),
        ({"generators": {"scar": {"categories": {"partz": 0}}}}, "generation.generators.scar.categories"),
    ):
        done = flawsmith("plan", write_config(parts, generation=generation), "-w", parts / "w")
        assert done.returncode == 2 and not (parts / "w" / "rounds").exists()
        assert f"{setting}: no category is called 'partz'; did you mean 'parts'?" in done.stderr


def test_a_file_name_that_is_no_utf8_is_printed_all_the_same(monkeypatch):
    row = {"path": "new/bad\udcff.png", "score": 0.5, "anomalous": False, "error": None}
    monkeypatch.setattr("workflows.predict.predict", lambda *_args, **_kwargs: [row])
    done = flawsmith("predict", "detector", "new")
    assert done.returncode == 0 and done.stdout.encode() == b"new/bad\\udcff.png: 0.5000 good\n"


def test_a_weight_of_a_picture_that_no_sample_is_made_from_is_refused(parts):
    for generation, why in (
        ({"normals": {"parts/none": 2}}, "generation.normals: no normal picture of the train split has the"),
        ({"nearest": {"parts/none": "scar"}}, "generation.nearest: no normal picture of the train split"),
    ):
        done = flawsmith("plan", write_config(parts, generation=generation), "-w", parts / "w")
        assert done.returncode == 2 and not (parts / "w" / "rounds").exists()
        assert why in done.stderr and "'parts/none'" in done.stderr
    assert flawsmith("plan", write_config(parts), "-w", parts / "w").returncode == 0
    rows = Workspace(str(parts / "w")).read_table("images.parquet").to_pylist()
    known = next(row["image_id"] for row in rows if row["split"] == "train")
    given = {"normals": {known: 2}, "nearest": {known: "scat"}}
    done = flawsmith("plan", write_config(parts, generation=given), "-w", parts / "v")
    assert done.returncode == 2 and f"generation.nearest.{known}: 'scat' is none of" in done.stderr
    given["nearest"][known] = "scar"
    assert flawsmith("plan", write_config(parts, generation=given), "-w", parts / "v").returncode == 0


def test_a_setting_that_is_written_twice_is_refused(parts):
    config = write_config(parts)
    config.write_text("source: parts\nsamples: 3\nsamples: 4\n")
    done = flawsmith("config", "check", config)
    assert done.returncode == 2 and "'samples' twice" in done.stderr and "line 3" in done.stderr


def test_an_interrupted_command_says_that_it_goes_on(parts):
    """Ctrl-C, as a shell sends it: to a process that has begun its round and that does not ignore the signal,
    as what a script starts in the background, these tests perhaps, does from its start."""
    config = write_config(parts, samples=100_000_000)
    command = [sys.executable, "-m", "workflows.cli", "plan", config, "-w", parts / "w"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=heard) as running:
        try:
            while not (parts / "w" / "rounds" / "000" / "recipes" / "part-00001.parquet").exists():
                assert running.poll() is None
                time.sleep(0.05)
            running.send_signal(signal.SIGINT)
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()  # or a failure would wait for its hundred million recipes
    assert running.returncode == 1
    assert said.splitlines()[-1] == "flawsmith: interrupted; the same command goes on where it stopped"


def test_dry_run_estimates_and_writes_nothing(parts):
    done = flawsmith("run", write_config(parts, samples=1000), "-w", parts / "w", "--dry-run")
    assert done.returncode == 0, done.stderr
    for word in ("samples", "bytes", "time", "memory"):
        assert word in done.stdout
    assert not (parts / "w").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("train", "W"),
        ("verify", "W"),
        ("show", "W"),
        ("evaluate", "W", "--final"),
        ("replay", "W", "000-00000-00000"),
        ("replay", "W", "../../etc/passwd"),
        ("export", "W", "out"),
        ("review", "W", "--reject", "x"),
        ("predict", "W", "W"),
    ],
)
def test_commands_on_what_is_no_workspace(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = flawsmith(*(tmp_path / "nothing" if word == "W" else word for word in words))
    assert done.returncode in (1, 2), done.stdout
    assert "Traceback" not in done.stderr and done.stderr.startswith("flawsmith: ")


def test_rejecting_a_sample_of_an_earlier_configuration_says_what_is_not_trained_again(tmp_path):
    space = write_workspace(tmp_path)
    stored = space.read_yaml("rounds/001/settings.yaml")
    space.write_yaml("rounds/001/settings.yaml", {**stored, "first": 1})
    done = flawsmith("review", space.url, "--reject", "001-00000-00000")
    assert done.stdout.startswith("1 sample rejected; 1 rejected in all,")
    assert "train --round N" not in done.stdout
    done = flawsmith("review", space.url, "--reject", "000-00000-00000")
    assert done.stdout.startswith("1 sample rejected; 2 rejected in all,")
    assert "train --round N" in done.stdout
    done = flawsmith("review", space.url, "--restore", "000-00000-00000")
    assert done.stdout.startswith("1 sample restored; 1 rejected in all,")
    assert "train --round N" in done.stdout
    for words, why in (
        (("--restore", "000-00000-00000"), "not rejected, so nothing to restore: 000-00000-00000"),
        (("--reject", "001-00000-00000", "--restore", "001-00000-00000"), "to reject and to restore at once"),
        (("--restore", "009-00000-00000"), "no accepted samples here"),
    ):
        done = flawsmith("review", space.url, *words)
        assert done.returncode == 2 and why in done.stderr and "nothing was stored" in done.stderr
    assert vetoes(space) == {"001-00000-00000"}


def test_an_error_leaves_the_process_with_its_exit_code(tmp_path):
    command = [sys.executable, "-c", "from workflows.cli import main; main()", "config", "check", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("flawsmith: none.yaml does not exist")
