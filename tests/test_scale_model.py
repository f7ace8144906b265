"""The model behind docs/scale.md: its tables, and those of its inputs that other places hold too."""

import re
from pathlib import Path

import numpy as np
import pytest

from detectors import onenip
from generation.cut.settings import CutParams
from tests.benchmarks import flops, scale_model
from tests.benchmarks.cut import our_calls
from training.examples import extract
from workflows.config import Config

ROOT = Path(__file__).parent.parent


def test_the_document_holds_what_the_command_prints():
    text = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    assert scale_model.filled(text) == text, "python -m tests.benchmarks.scale_model --into docs/scale.md"


def test_a_table_without_a_place_is_named():
    with pytest.raises(ValueError, match="0 places for the table inputs"):
        scale_model.filled("nothing")


def test_generators_take_what_the_readme_says():
    rows = re.findall(r"\| `(\S+)` \|.*\| ([\d.]+), ([\d.]+) \|\n", (ROOT / "README.md").read_text("utf-8"))
    assert {name: (float(small), float(large)) for name, small, large in rows} == scale_model.GENERATORS


def test_the_mix_is_the_default_one():
    shares = {name: s.share for name, s in Config(source="x").generation.generators.items()}
    assert shares == scale_model.MIX


def test_the_parts_of_a_run_sum_to_about_its_measured_rate():
    mix = scale_model.MIX
    drawing = sum(share * scale_model.GENERATORS[name][0] for name, share in mix.items()) / sum(mix.values())
    parts = scale_model.with_encoding(drawing, 256)
    assert parts == pytest.approx(scale_model.default_mix(256), rel=0.25)


def test_operations_and_peaks_are_those_counted_elsewhere():
    for card, peak in flops.PEAK.items():
        assert scale_model.of(f"{card} peak") * 1e12 == peak
    once = flops.blocks(flops.sd15())
    assert once["unet"] / 1e12 == pytest.approx(scale_model.of("UNet"), rel=1e-3)
    assert flops.total(once, our_calls(CutParams())) / 1e12 == pytest.approx(
        scale_model.of("cut, SD 1.5"), rel=1e-3
    )


def test_features_of_a_training_sample_have_the_stated_size():
    settings = onenip.OneNIPSettings()
    features = extract(onenip.build(settings, ["a"]), [np.zeros((256, 256, 3), np.uint8)])
    assert features[0].nbytes == scale_model.of("features")
    assert settings.size**2 == scale_model.of("training mask")


@pytest.mark.parametrize("samples", scale_model.SAMPLES)
def test_ten_times_larger_shards_take_a_tenth_of_the_client(samples):
    small, large = (scale_model.loads(samples, size, scale_model.WEEK) for size in (1_000, 10_000))
    for name in ("client and scheduler, time", "client, memory", "PUTs of a prefix"):
        assert small[name] == pytest.approx(10 * large[name], rel=0.01)
