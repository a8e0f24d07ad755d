"""The program `megabagel.generate` in this process: answers, pictures with metadata, several samples, turns."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megabagel import generate

CASE = Path(__file__).parents[1] / "golden" / "public-basic" / "ckpt"


def run(*arguments: object) -> None:
    generate.main(["--model", str(CASE), *map(str, arguments)])


def test_a_picture_says_how_it_was_made(tmp_path, capsys):
    source = tmp_path / "source.png"
    Image.new("RGB", (40, 40), "red").save(source)
    out = tmp_path / "new" / "out.png"
    run("--prompt", "Ein Häuschen", "--image", source, "--num-timesteps", 3, "--samples", 2, "--seed", 7, "--out", out)
    assert not out.exists()
    for number in range(2):
        with Image.open(out.with_name(f"out_{number}.png")) as picture:
            picture.load()
            assert picture.size == (128, 128)
            assert picture.text["prompt"] == "Ein Häuschen" and picture.text["seed"] == str(7 + number)
            assert json.loads(picture.text["settings"])["num_timesteps"] == 3
    assert "128 x 128 pixels in" in capsys.readouterr().out


def test_an_answer_is_printed_and_turns_give_texts_and_pictures(tmp_path, capsys):
    run("--prompt", "How many?", "--max-tokens", 4)
    answer = capsys.readouterr().out
    assert answer.strip()
    size = ("--height", 16, "--width", 16)
    run(
        "--prompt",
        "How many?",
        "--max-tokens",
        4,
        "--num-timesteps",
        3,
        "--turns",
        "text",
        "picture",
        "--out",
        tmp_path / "a.png",
        *size,
    )
    assert capsys.readouterr().out.startswith(answer)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (16, 16)


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        generate.main(["--help"])
    assert ended.value.code == 0
    assert "--prompt" in capsys.readouterr().out
