"""Files of requests and the settings about samples: what is read, and the sentence for everything that is wrong."""

import json
import re

import pytest
import yaml
from PIL import Image

from megabagel.config.checks_samples import samples_faults
from megabagel.config.errors import ConfigError
from megabagel.config.requests import Request, read_entries
from megabagel.config.schema import Config
from megabagel.training.samples import batches

ENTRIES = [{"prompt": "a cat", "height": 64}, {"question": "what?", "images": ["a.png"]}]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("name", ("a.yaml", "a.json", "a.jsonl"))
def test_all_forms_of_files_say_the_same(folder, name):
    texts = {"a.yaml": yaml.safe_dump(ENTRIES), "a.json": json.dumps(ENTRIES)}
    (folder / name).write_text(texts.get(name, "\n".join(map(json.dumps, ENTRIES)) + "\n\n"))
    cat, what = read_entries(folder / name, Request, "here")
    assert cat == Request(prompt="a cat", height=64) and cat.draws and cat.text == "a cat"
    assert what.images == [str(folder / "a.png")] and not what.draws and what.text == "what?"


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([], "here: .* has no entry"),
        ({"prompt": "a"}, "here: .* must hold a list"),
        ([{"prompt": "a"}, {"images": []}], "entry 2: give either `prompt`"),
        ([{"prompt": "a", "question": "b"}], "entry 1: give either `prompt`"),
        ([{"prompts": "a"}], "entry 1: unknown key `prompts`, did you mean `prompt`"),
        ([{"prompt": "a", "images": ["no.png"]}], "entry 1, key `images`: there is no file .*no.png"),
        ([{"prompt": 3}], "entry 1, key `prompt` must be a text"),
    ],
)
def test_what_is_wrong_is_said(folder, entries, sentence):
    (folder / "a.yaml").write_text(yaml.safe_dump(entries))
    with pytest.raises(ConfigError, match=sentence):
        read_entries(folder / "a.yaml", Request, "here")


def test_files_that_cannot_be_read_are_named(folder):
    with pytest.raises(ConfigError, match="here: .*no.yaml cannot be read"):
        read_entries(folder / "no.yaml", Request, "here")
    (folder / "bad.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="bad.jsonl is no JSONL file"):
        read_entries(folder / "bad.jsonl", Request, "here")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"samples.interval": -1}, "must not be negative"),
        ({"samples.prompts_file": None}, "samples.prompts_file is not set"),
        ({"samples.num_timesteps": 1}, "samples.num_timesteps is 1, but must be at least 2"),
        ({"parallel.pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size is 2: samples are made only"),
        ({"parallel.expert_model_parallel_size": 2}, "expert_model_parallel_size is 2: samples are made only"),
        ({"optimizer.ema_decay": None}, "keeps no moving average"),
        ({"model.visual_gen": False}, "entry 1 asks for a picture, but model.visual_gen is false"),
        ({"model.visual_und": False}, "entry 2 shows a picture, but model.visual_und is false"),
        ({"model.max_latent_size": 2}, "a side of 64 pixels cannot be made; .* from 16 to 32"),
        ({}, None),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, settings, sentence):
    (folder / "a.yaml").write_text(yaml.safe_dump(ENTRIES))
    config = Config()
    config.samples.interval, config.samples.prompts_file = 10, str(folder / "a.yaml")
    for name, value in settings.items():
        group, field = name.split(".")
        setattr(getattr(config, group), field, value)
    fault = next(samples_faults(config), None)
    assert (fault is None) == (sentence is None)
    if sentence:
        assert re.search(sentence, fault), fault


def test_requests_that_ask_for_the_same_are_worked_on_together():
    requests = [Request(prompt="a"), Request(question="b"), Request(prompt="c"), Request(prompt="d", height=64)]
    assert batches(requests, range(4), 8) == [[0, 2], [1], [3]]
    assert batches(requests, (0, 2), 1) == [[0], [2]]
