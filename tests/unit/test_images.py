"""Resize rule against the reference table, and decoding of every kind of picture users bring."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megabagel.config.datasets import ImageTransformArgs
from megabagel.data.faults import DataFault
from megabagel.data.images import decode, header_size, resize, target_size
from tests.unit.data_fixtures import png

RESIZE = json.loads((Path(__file__).parents[1] / "golden" / "resize.json").read_text())


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("case", RESIZE["cases"], ids=lambda case: f"stride{case['config']['stride']}")
def test_resize_rule_reproduces_the_reference_table(case):
    config = case["config"]
    args = ImageTransformArgs(config["stride"], config["max_size"], config["min_size"], config["max_pixels"])
    assert len(case["rows"]) == 200
    for width, height, num_images, *expected in case["rows"]:
        assert [*target_size(width, height, args, num_images)] == expected, (width, height, num_images)


def test_pixels_are_uint8_rows_first():
    pixels = resize(decode(png(3, (40, 20))), (64, 32))
    assert pixels.shape == (32, 64, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
    assert (pixels == [3, 0, 7]).all()


def test_transparency_is_composited_on_white():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert np.asarray(decode(encoded(clear))).min() == 255
    assert np.unique(np.asarray(decode(encoded(half)))).tolist() == [127]
    assert np.asarray(decode(encoded(palette, transparency=0))).min() == 255


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGB", "LA"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (6, 4))
    assert decode(encoded(image, "TIFF")).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped():
    image = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert np.unique(np.asarray(decode(encoded(image)))).tolist() == [128]


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert decode(turned).size == header_size(turned) == (4, 8)


def test_bad_pictures_are_faults_that_say_what_is_wrong(tmp_path):
    with pytest.raises(DataFault, match="unknown format") as raised:
        decode(b"no picture")
    assert raised.value.kind == "undecodable_image"
    with pytest.raises(DataFault, match="truncated"):
        decode(encoded(Image.effect_noise((64, 64), 50), "JPEG")[:600])
    with pytest.raises(DataFault, match="does not exist") as raised:
        decode(str(tmp_path / "gone.png"))
    assert raised.value.kind == "missing_file"
