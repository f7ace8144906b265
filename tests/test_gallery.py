"""The gallery: every generator at three severities on given pictures."""

import re

import cv2
import numpy as np
import pytest

from generation import registry
from manifests.errors import UsageError
from tests.test_cli import flawsmith
from tests.test_generators import picture
from workflows.gallery import SEVERITIES, gallery


@pytest.fixture
def plate(tmp_path):
    path = tmp_path / "plate <b>.png"
    cv2.imwrite(str(path), picture(90, 120))
    return path


def test_a_page_shows_every_generator_and_escapes_its_texts(plate, tmp_path):
    names = [name for name in registry.BUILT_IN if registry.get(name).family in ("classic", "frequency")]
    out = gallery([plate], tmp_path / "gallery.html", names=names)
    text = out.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == len(names) * len(SEVERITIES)
    assert all(f"<th>{name}</th>" in text for name in names)
    assert "plate &lt;b&gt;.png" in text and "<b>" not in text
    assert not re.search(r"https?://", text)  # the page is whole by itself


def test_a_sheet_has_a_line_a_generator_and_picture(plate, tmp_path):
    other = tmp_path / "other.png"
    cv2.imwrite(str(other), picture(60, 60, seed=3))
    out = gallery([plate, other], tmp_path / "deep" / "gallery.png", names=["band", "peak"])
    shown = cv2.imread(str(out))
    assert shown.shape[0] > 4 * 160 and shown.shape[1] > 3 * 160
    again = gallery([plate, other], tmp_path / "again.png", names=["band", "peak"])
    assert again.read_bytes() == out.read_bytes()
    different = cv2.imread(str(gallery([plate, other], tmp_path / "b.png", names=["band", "peak"], seed=1)))
    assert np.abs(shown.astype(int) - different).max() > 50


@pytest.mark.parametrize(
    ("names", "out", "message"),
    [
        (["bend"], "g.png", "did you mean band"),
        (["feature-noise"], "g.png", "feature-noise: changes features"),
        (["band"], "g.jpg", r"\.png or \.html"),
    ],
)
def test_what_cannot_be_shown_is_named(names, out, message, plate, tmp_path):
    with pytest.raises(UsageError, match=message):
        gallery([plate], tmp_path / out, names=names)


def test_a_picture_is_never_replaced(plate):
    before = plate.read_bytes()
    with pytest.raises(UsageError, match="would replace the picture"):
        gallery([plate], plate.parent / "." / plate.name, names=["scar"])
    assert plate.read_bytes() == before


def test_the_command(plate, tmp_path):
    out = tmp_path / "g.png"
    done = flawsmith("gallery", plate, "--out", out, "--generator", "scar")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out) and out.exists()
