"""The contact sheet: cells where they belong, texts inside of their cells, transparent pictures on white."""

import numpy as np
import pytest
from PIL import Image

from megabagel.evaluation.contact_sheet import contact_sheet

RED, BLUE = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (300, 150), "blue")


def pixels_of(image, colour) -> np.ndarray:
    """Rows and columns of that colour."""
    return np.argwhere((np.asarray(image) == colour).all(-1))


def test_pictures_stand_side_by_side_and_keep_their_shape(tmp_path):
    sheet = contact_sheet([[RED, BLUE]], tmp_path / "new" / "sheet.png", side=100)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "sheet.png")), np.asarray(sheet))
    red, blue = pixels_of(sheet, (255, 0, 0)), pixels_of(sheet, (0, 0, 255))
    assert (np.ptp(red, 0) + 1 == (96, 96)).all()  # enlarged by a whole factor
    assert (np.ptp(blue, 0) + 1 == (49, 98)).all()
    assert red[:, 1].max() < blue[:, 1].min()


def test_texts_stay_inside_of_their_cells_and_make_room_below(tmp_path):
    text = "some words and one " + "endless" * 30
    plain = contact_sheet([[RED, BLUE]], tmp_path / "a.png", side=100)
    noted = contact_sheet([[RED, BLUE], [RED]], tmp_path / "b.png", [[text, ""], ["ж"]], side=100)
    assert noted.height > 2 * plain.height
    ink = np.argwhere(np.asarray(noted.convert("L")) < 60)
    below_red = ink[(ink[:, 0] > 110) & (ink[:, 0] < noted.height - 120)]
    assert len(below_red) > 100 and below_red[:, 1].max() < 8 + 100


def test_a_text_alone_is_a_heading_over_the_whole_width(tmp_path):
    heading = "a heading that is longer than one cell is wide"
    sheet = contact_sheet([[heading], [RED, RED, RED, RED]], tmp_path / "a.png", side=100)
    ink = np.argwhere(np.asarray(sheet.convert("L")) < 60)
    assert ink[:, 1].max() > 200


def test_what_is_transparent_becomes_white(tmp_path):
    sheet = contact_sheet([[Image.new("RGBA", (50, 50), (255, 0, 0, 0))]], tmp_path / "a.png")
    assert len(pixels_of(sheet, (255, 0, 0))) == 0


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="2 rows of captions for 1 rows"):
        contact_sheet([[RED]], tmp_path / "a.png", [["a"], ["b"]])
