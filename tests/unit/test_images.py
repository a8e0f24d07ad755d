"""Resize rule against the reference table, and decoding of every kind of picture users bring."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from megabagel.config.datasets import ImageTransformArgs
from megabagel.data.faults import DataFault
from megabagel.data.images import FORMATS, decode, header_size, resize, target_size
from tests.unit.data_fixtures import png
from tests.unit.hostile import png_with

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


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_tells_its_size_before_it_is_decoded_and_can_be_resized_after(format):
    picture = encoded(Image.linear_gradient("L").convert("RGB").resize((36, 20)), format)
    image = decode(picture)
    assert header_size(picture) == image.size == (36, 20) and image.mode == "RGB"
    pixels = resize(image, (18, 10))
    assert pixels.shape == (10, 18, 3) and pixels[0].mean() + 50 < pixels[-1].mean()


def test_only_the_first_picture_of_a_file_counts():
    frames = [Image.new("RGB", (8, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for format in ("GIF", "WEBP", "TIFF", "MPO"):  # the last is what phones call JPEG
        assert decode(encoded(frames[0], format, save_all=True, append_images=frames[1:])).getpixel((0, 0))[0] > 200


def test_transparency_is_the_same_in_every_band_of_rows():
    alpha = Image.linear_gradient("L").resize((3, 700))
    picture = Image.new("RGBA", alpha.size, (10, 20, 30, 0))
    picture.putalpha(alpha)
    white = Image.new("RGBA", alpha.size, (255, 255, 255, 255))
    expected = np.asarray(Image.alpha_composite(white, picture).convert("RGB"), dtype=int)
    assert abs(np.asarray(decode(encoded(picture)), dtype=int) - expected).max() <= 1


def fault(source, max_pixels: int = 10_000, read=decode) -> DataFault:
    with pytest.raises(DataFault) as raised:
        read(source, max_pixels)
    return raised.value


def test_bad_pictures_are_faults_that_say_what_is_wrong(tmp_path):
    found = fault(b"no picture")
    assert found.kind == "undecodable_image" and "unknown format" in str(found)
    assert "truncated" in str(fault(encoded(Image.effect_noise((64, 64), 50), "JPEG")[:600]))
    found = fault(str(tmp_path / "gone.png"))
    assert found.kind == "missing_file" and "does not exist" in str(found)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name in ("pipe.png", "loop.png", ".", "n" * 300, "nul\0.png", "\ud800.png"):
        assert fault(str(tmp_path / name)).kind in ("unreadable_file", "undecodable_image")


@pytest.mark.parametrize("read", [header_size, decode])
def test_pictures_above_the_pixel_limit_are_never_decoded(read, tmp_path):
    huge = [png_with(size=(2**31 - 1, 2**31 - 1)), png_with(size=(101, 100)), encoded(Image.new("1", (9000, 9000)))]
    for picture in huge:
        found = fault(picture, read=read)
        assert found.kind == "image_bomb" and "data.max_image_pixels = 10000" in str(found)
    assert header_size(huge[2], 81_000_000) == (9000, 9000)
    (tmp_path / "large").write_bytes(bytes(80_001))
    assert fault(str(tmp_path / "large")).kind == "image_bomb"


def test_texts_and_profiles_that_unpack_to_a_hundred_megabytes_are_bombs():
    packed = zlib.compress(bytes(100 << 20))
    assert fault(png_with((b"zTXt", b"a\0\0" + packed))).kind == "image_bomb"
    assert fault(png_with((b"iTXt", b"a\0\1\0\0\0" + packed))).kind == "image_bomb"
    assert fault(png_with((b"iCCP", b"a\0\0" + packed))).kind == "image_bomb"
    assert decode(png_with((b"zTXt", b"a\0\0" + zlib.compress(bytes(4 << 20))))).size == (8, 8)


def test_a_tile_larger_than_the_picture_is_a_bomb():
    tags = [(256, 4, 8), (257, 4, 8), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]
    tags += [(322, 4, 60000), (323, 4, 60000), (324, 4, 8), (325, 4, 8)]  # sides, offset and bytes of the one tile
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    tiff = struct.pack("<2sHIQH", b"II", 42, 16, 0, len(tags)) + entries + bytes(4)
    found = fault(tiff)
    assert found.kind == "image_bomb" and "60000 x 60000" in str(found)


def test_float_pictures_must_be_finite():
    pixels = np.full((4, 4), 100, dtype=np.float32)
    assert np.unique(np.asarray(decode(encoded(Image.fromarray(pixels), "TIFF")))).tolist() == [100]
    for value in (np.nan, np.inf):
        pixels[1, 2] = value
        assert fault(encoded(Image.fromarray(pixels), "TIFF")).kind == "nan_pixels"


def test_broken_exif_does_not_lose_the_picture():
    picture = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(picture).size == header_size(picture) == (8, 4)


def test_pictures_are_read_from_urls():
    with fsspec.open("memory://pictures/a.png", "wb") as file:
        file.write(png(3, (40, 20)))
    assert header_size("memory://pictures/a.png") == decode("memory://pictures/a.png").size == (40, 20)
    assert fault("memory://pictures/gone.png").kind == "missing_file"
    assert fault("memory://pictures/a.png", 4).kind == "image_bomb"
