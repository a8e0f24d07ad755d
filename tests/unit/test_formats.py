"""What every format becomes, from the example files to the plan of a sample; rules, overrides and paths of formats."""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from megabagel.config.datasets import FORMATS as NAMES
from megabagel.config.datasets import FrameSamplerArgs, load_dataset_groups
from megabagel.config.schema import DataConfig
from megabagel.data.document import Entry, lay_out
from megabagel.data.faults import DataFault
from megabagel.data.images import decode
from megabagel.data.prepare import Preparer
from megabagel.data.sources import FORMATS, open_source
from megabagel.data.sources.context import Context
from megabagel.data.text import Tokenizer
from megabagel.packing.geometry import Geometry
from megabagel.packing.plan import CAUSAL, FULL, NOISE
from megabagel.packing.splits import CLEAN_TIMESTEP, TEXT, VAE, VIT
from tests.unit.data_fixtures import TOKENIZER, make_reader, png

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
SEED = 0

# Each part: kind, ! learnt or generated, ? may be dropped, content (a text, or the picture's number and name), then its
# tokens with the two that frame it and the RoPE id of the first.
EXPECTED = {
    ("t2i_pretrain", 0): [
        ("text?", "A red circle on a white ground.", 19, 0),
        ("vae!", "0", 8, 19),
    ],
    ("unified_edit", 1): [
        ("vae?", "0", 8, 0),
        ("vit?", "0", 8, 1),
        ("text?", "Paint it blue.", 10, 2),
        ("vae!", "1", 8, 12),
    ],
    ("vlm_sft", 0): [
        ("vit", "0 two_circles", 8, 0),
        ("text", "How many circles?", 10, 1),
        ("text!", "Two.", 6, 11),
    ],
    ("vlm_sft", 1): [
        ("vit", "0 red_circle", 8, 0),
        ("vit", "1 tall", 8, 1),
        ("text", "Which one has a square?", 16, 2),
        ("text!", "The second.", 9, 18),
        ("text", "Its colour?", 6, 27),
        ("text!", "Red.", 5, 33),
    ],
    ("vlm_sft", 2): [
        ("vit", "0 0", 8, 0),
        ("vit", "1 1", 8, 1),
        ("vit", "2 2", 8, 2),
        ("text", "Where does it move?", 13, 3),
        ("text!", "To the right.", 9, 16),
    ],
    ("vlm_sft", 3): [
        ("text", "Say hello.", 10, 0),
        ("text!", "Hello.", 7, 10),
    ],
    ("conversations", 0): [
        ("text?", "You draw shapes.", 13, 0),
        ("vae?", "0 red_circle", 8, 13),
        ("vit?", "0 red_circle", 8, 14),
        ("text?", "Make it blue.", 8, 15),
        ("text!", "Here it is.", 10, 23),
        ("vae!", "1 blue_circle", 8, 33),
    ],
    ("conversations", 1): [
        ("text", "Name a colour.", 9, 0),
        ("text", "Mauve, I mean.", 13, 9),
        ("text", "A common one.", 12, 22),
        ("text!", "Red.", 5, 34),
    ],
    ("text_to_image", 0): [
        ("text?", "A blue square.", 9, 0),
        ("vae!", "0 blue_square", 8, 9),
    ],
    ("text_to_image", 2): [
        ("text?", "A green square.", 9, 0),
        ("vae!", "0", 8, 9),
    ],
    ("image_to_text", 0): [
        ("vit", "0 red_circle", 8, 0),
        ("text!", "A red circle.", 9, 1),
    ],
    ("image_to_text", 1): [
        ("vit", "0 tall", 8, 0),
        ("text", "What is below?", 10, 1),
        ("text!", "A red square.", 9, 11),
    ],
    ("image_to_text", 2): [
        ("vit", "0", 8, 0),
        ("text!", "A red and a blue circle.", 12, 1),
    ],
    ("image_to_text", 3): [
        ("vit", "0", 8, 0),
        ("text", "Which shape?", 10, 1),
        ("text!", "A square.", 8, 11),
    ],
    ("multi_step_editing", 0): [
        ("vae?", "0 red_circle", 8, 0),
        ("vit?", "0 red_circle", 8, 1),
        ("text?", "Paint it blue.", 10, 2),
        ("vae!", "1 blue_circle", 8, 12),
        ("vae?", "1 blue_circle", 8, 12),
        ("vit?", "1 blue_circle", 8, 13),
        ("text?", "Turn it into a square.", 16, 14),
        ("vae!", "2 blue_square", 8, 30),
    ],
    ("sequence", 0): [
        ("vae?", "0 red_circle", 8, 0),
        ("text", "Paint it blue.", 10, 1),
        ("vae!", "1 blue_circle", 8, 11),
        ("vae?", "1 blue_circle", 8, 11),
        ("vit?", "1 blue_circle", 8, 12),
        ("text!", "Now it is blue.", 10, 13),
    ],
    ("interleaved", 0): [
        ("vae?", "0 tall", 8, 0),
        ("vit?", "0 tall", 8, 1),
        ("text!", "A circle above a square.", 14, 2),
        ("vae!", "1 green_square", 8, 16),
        ("vae?", "1 green_square", 8, 16),
        ("vit?", "1 green_square", 8, 17),
        ("text?", "And two circles.", 13, 18),
        ("vae!", "2 two_circles", 8, 31),
    ],
    ("pretrain_pair", 0): [
        ("text?", "A red circle.", 9, 0),
        ("vae!", "0 red_circle", 8, 9),
    ],
    ("pretrain_pair", 1): [
        ("vit", "0 blue_circle", 8, 0),
        ("text!", "A blue circle.", 9, 1),
    ],
    ("pretrain_pair", 2): [
        ("vit", "0 green_square", 8, 0),
        ("text!", "A green square.", 9, 1),
    ],
    ("sft_chat", 0): [
        ("text", "Be brief.", 8, 0),
        ("vit", "0 tall", 8, 8),
        ("text", "What is on top?", 10, 9),
        ("text!", "A circle.", 8, 19),
    ],
    ("sft_chat", 1): [
        ("text", "First", 7, 0),
        ("vit", "0 red_circle", 8, 7),
        ("text", "then", 5, 8),
        ("vit", "1 blue_circle", 8, 13),
        ("text", ": what changed?", 11, 14),
        ("text!", "The colour.", 5, 25),
    ],
    ("text", 0): [
        ("text!", "A circle has no corners.", 19, 0),
    ],
    ("text", 1): [
        ("text", "How many corners has a square?", 19, 0),
        ("text!", "Four.", 6, 19),
    ],
    ("video", 0): [
        ("vit", "0 0", 8, 0),
        ("vit", "1 1", 8, 1),
        ("vit", "2 2", 8, 2),
        ("text", "What moves?", 5, 3),
        ("text!", "A red circle.", 9, 8),
    ],
    ("video", 1): [
        ("vit", "0 0", 8, 0),
        ("vit", "1 3", 8, 1),
        ("text!", "It moves to the right.", 11, 2),
    ],
}


@pytest.fixture(scope="module")
def groups():
    return load_dataset_groups(str(EXAMPLES / "data.yaml"))


@pytest.fixture(scope="module")
def preparer(groups):
    tokenizer = Tokenizer(TOKENIZER)
    off = {f"{kind}_cond_dropout_prob": 0.0 for kind in ("text", "vit", "vae")}
    config = DataConfig(seed=SEED, max_num_tokens_per_sample=1000, **off)
    return Preparer(groups, config, tokenizer, Geometry(16, 8, 14, 8, tokenizer.special))


def test_every_format_has_an_example_and_a_function(groups):
    assert sorted(groups) == sorted(NAMES) == sorted(FORMATS)
    assert {name for name, _ in EXPECTED} == set(NAMES)


@pytest.mark.parametrize(("name", "row"), list(EXPECTED))
def test_example_files_become_the_plan_that_the_format_means(name, row, groups, preparer):
    index = list(groups).index(name)
    source = open_source(name, groups[name], SEED)
    key = (index, row, 0)
    entries = source.document(row, key)
    parts = lay_out(entries)
    planned = preparer.measure(index, entries, key, source.origin(row))
    assert source.faults == [] and (planned.key, planned.group) == (key, name)
    assert planned.origin == source.origin(row) and str(EXAMPLES) in planned.origin
    found = []
    for i, (part, piece) in enumerate(zip(parts, planned.pieces, strict=True)):
        marks = "!" * part.loss + "?" * part.enable_cfg
        content = part.text if part.image is None else f"{part.image.number} {Path(part.image.path or '').stem}".strip()
        found.append((part.kind.removesuffix("_image") + marks, content, piece.length, piece.rope_start))
        check_piece(piece, part, (*key, i), preparer.tokenizer)
    assert found == EXPECTED[name, row]
    assert planned.num_tokens == sum(length for *_, length, _ in found)
    assert planned.vae_items == [i for i, part in enumerate(parts) if part.kind == "vae_image"]
    assert planned.vit_items == [i for i, part in enumerate(parts) if part.kind == "vit_image"]
    assert planned.vae_pixels == [None] * len(planned.vae_items)


def check_piece(piece, part, image_key, tokenizer):
    """All fields of a piece that follow from its part."""
    assert piece.starts_split and piece.loss == part.loss and piece.special_token_label is None
    if part.kind == "text":
        assert (piece.kind, piece.mode, piece.grid, piece.image_key) == (TEXT, CAUSAL, None, None)
        assert tokenizer.decode(piece.text_ids.tolist()) == part.text and piece.length == len(piece.text_ids) + 2
        return
    assert piece.text_ids is None and piece.length == piece.grid[0] * piece.grid[1] + 2
    assert piece.kind == (VIT if part.kind == "vit_image" else VAE)
    assert piece.mode == (NOISE if part.loss else FULL)
    assert (piece.timestep == CLEAN_TIMESTEP) == (not part.loss)
    if piece.kind == VAE:
        assert piece.image_key[: len(image_key) - 1] == image_key[:-1]


def test_every_row_of_the_examples_trains_and_can_be_read(groups, preparer):
    rows = 0
    for index, (name, group) in enumerate(groups.items()):
        source = open_source(name, group, SEED)
        for row in range(sum(source.blocks)):
            key = (index, row, 0)
            entries = source.document(row, key)
            assert any(entry.loss for entry in entries)
            planned = preparer.read(preparer.measure(index, entries, key, source.origin(row)), index, entries)
            for pixels in (*planned.vit_pixels, *planned.vae_pixels):
                assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
            rows += 1
    assert rows == 30


def test_all_formats_train_in_one_mixture(groups):
    drawn: Counter = Counter()
    sizes = {"expected_num_tokens": 500, "max_num_tokens": 600, "max_num_tokens_per_sample": 300}
    with make_reader(groups, **sizes) as reader:
        for _ in range(12):
            for pack in reader.next_step():
                drawn.update(pack.groups)
                assert pack.plan.sequence_length <= 600 and len(pack.plan.ce_rows) + len(pack.plan.mse_rows)
        assert set(drawn) == set(NAMES) and not any(reader.fault_counts().values())


# --- rules


def context(row: dict, folder: str = "/nowhere", visit: int = 0, **fields) -> Context:
    return Context((0, 0, visit), SEED, folder, row, **fields)


def entries_of(name: str, row: dict, **fields) -> list[Entry]:
    return FORMATS[name].entries(row, context(row, **fields))


def losses(name: str, row: dict) -> list[bool]:
    return [entry.loss for entry in entries_of(name, row)]


def test_a_pair_without_a_task_goes_both_ways(tmp_path):
    row = {"text": "a cat", "image": "cat.png"}
    ways = [entries_of("pretrain_pair", row, visit=visit)[0].text is not None for visit in range(200)]
    assert 70 < sum(ways) < 130
    assert ways[:20] == [entries_of("pretrain_pair", row, visit=visit)[0].text is not None for visit in range(20)]


@pytest.mark.parametrize("name", ["conversations", "sequence", "interleaved"])
def test_an_item_may_override_its_loss_and_how_it_enters(name):
    key = {"conversations": "messages", "sequence": "sequence", "interleaved": "content"}[name]
    items = [
        {"role": "user", "type": "image", "image_path": "a.png", "vae": False, "enable_cfg": False},
        {"role": "user", "type": "text", "content": "what", "loss": True},
        {"role": "assistant", "type": "image", "image_path": "b.png", "loss": False},
        {"role": "assistant", "type": "text", "content": "that", "loss": True},
    ]
    found = entries_of(name, {key: items})
    assert [entry.loss for entry in found] == [False, True, False, True]
    assert (found[0].vae, found[0].vit, found[0].enable_cfg) == (False, None, False)
    assert [entry.image.number for entry in found if entry.image] == [0, 1]


def test_losses_of_every_other_format_can_be_overridden():
    steps = [{"instruction": "x", "result_image": "b", "loss": False}, {"instruction": "y", "result_image": "c"}]
    assert losses("multi_step_editing", {"input_image": "a", "editing_steps": steps}) == [0, 0, 0, 0, 1]
    turns = [{"from": "human", "value": "q", "loss": True}, {"from": "gpt", "value": "a", "loss": False}]
    assert losses("vlm_sft", {"conversations": turns}) == [1, 0]
    assert losses("sft_chat", {"conversations": turns}) == [1, 0]


def test_pictures_of_a_chat_without_marks_come_before_its_first_question():
    turns = [{"from": "system", "value": "s"}, {"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
    found = entries_of("sft_chat", {"conversations": turns, "image": ["1.png", "2.png"]})
    assert [entry.text for entry in found] == ["s", None, None, "q", "a"]


def test_pictures_before_the_first_text_of_a_document_are_shown():
    items = [{"type": kind, "content": "x"} for kind in ("image", "image", "text", "image", "text")]
    assert losses("interleaved", {"content": items}) == [0, 0, 1, 1, 1]


def test_pictures_of_parquet_may_be_bytes_names_or_both():
    given = context({})
    assert given.image(b"png").content == b"png"
    assert given.image({"bytes": b"png", "path": "x.png"}).content == b"png"
    assert given.image({"bytes": None, "path": "x.png"}).path == "/nowhere/x.png"
    assert given.image("y.png").number == 3


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("conversations", {"messages": []}, "messages is empty"),
        ("conversations", {}, "key messages must be a list of objects, found nothing"),
        ("conversations", {"messages": [3]}, "messages 0 must be an object, found int"),
        ("conversations", {"messages": [{"role": "cat", "type": "text", "content": "x"}]},
         "messages 0: role must be user or assistant or system, found 'cat'"),
        ("conversations", {"messages": [{"role": "user", "type": "text", "content": "x"}]}, "nothing in it carries"),
        ("sequence", {"sequence": [{"type": "audio"}]}, "sequence 0: type must be text or image, found 'audio'"),
        ("sequence", {"sequence": [{"type": "text"}]}, "sequence 0: a text needs content or text"),
        ("sequence", {"sequence": [{"type": ["text"]}]}, "must be text or image"),
        ("sequence", {"sequence": [{"type": "text", "content": "x", "loss": 1}]},
         "sequence 0: loss must be true or false, found int"),
        ("interleaved", {"content": [{"type": "text", "content": 3}]}, "content 0: content must be a text, found int"),
        ("interleaved", {"content": [{"type": "image", "content": 3}]}, "picture 0 must be a file name or bytes"),
        ("text_to_image", {"text_prompt": "x"}, "key image_path (or image) must name a picture, found nothing"),
        ("text_to_image", {"image_path": "x.png"}, "key text_prompt must be a text, found nothing"),
        ("image_to_text", {"image_path": "x.png", "text": ["x"]}, "key text must be a text, found list"),
        ("multi_step_editing", {"input_image": "x.png", "editing_steps": [{"instruction": "y"}]},
         "picture 1 must be a file name or bytes, found None"),
        ("pretrain_pair", {"text": "x", "image": "x.png", "metadata": 3}, "key metadata must be an object, found int"),
        ("pretrain_pair", {"text": "x", "image": "x.png", "metadata": {"task": "sing"}}, "metadata: task must be"),
        ("sft_chat", {"conversations": [{"from": "cat", "value": "x"}]}, "conversations 0: from must be human or"),
        ("sft_chat", {"conversations": [{"from": "human", "value": "<image>"}]}, "1 <image> in the human turns, but 0"),
        ("text", {}, "key text must be a text, found nothing"),
        ("text", {"response": "x"}, "key prompt must be a text, found nothing"),
        ("video", {"text": "x"}, "video must be a folder of frames, a list of frames or a video file"),
        ("video", {"text": "x", "video": []}, "video must be a folder"),
        ("video", {"text": "x", "video": "clip"}, "video folder /nowhere/clip does not exist"),
        ("t2i_pretrain", {"image": b"", "captions": "[1]"}, "column captions must be a JSON object of strings"),
        ("t2i_pretrain", {"image": b"", "captions": 3}, "column captions is not valid JSON"),
        ("unified_edit", {"image_list": 3, "instruction_list": 4}, "image_list and instruction_list must be lists"),
        ("unified_edit", {"image_list": [b"", b""], "instruction_list": [4]}, "must hold one list of alternative"),
    ],
)  # fmt: skip
def test_a_row_of_a_wrong_shape_is_a_fault_that_names_the_field(name, row, message):
    with pytest.raises(DataFault) as fault:
        entries_of(name, row)
    assert message in str(fault.value) and "\n" not in str(fault.value)


# --- paths


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "in").mkdir(parents=True)
    (tmp_path / "data" / "in" / "a.png").write_bytes(png(1))
    (tmp_path / "secret.png").write_bytes(png(2))
    (tmp_path / "data" / "out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    (tmp_path / "data" / "loop.png").symlink_to(tmp_path / "data" / "loop.png")
    (tmp_path / "data" / "same.png").symlink_to("in/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "in/../../secret.png", "/etc/passwd", "out.png", "up/secret.png", "up/gone.png", "loop.png",
     "loop.png/x", "x" * 5000, "nul\0.png", "../gone.png", "up/data/../secret.png", "https://host/x.png"],
)  # fmt: skip
def test_nothing_outside_the_folder_of_a_data_set_is_opened(name, folder):
    with pytest.raises(DataFault) as fault:
        context({}, str(folder)).image(name)
    assert fault.value.kind == "path_outside" and "\n" not in str(fault.value) and len(str(fault.value)) < 600


@pytest.mark.parametrize("name", ["in/a.png", "./in/a.png", "in/../in/a.png", "same.png", "gone.png", "in/a.png/x"])
def test_names_below_the_folder_are_fine_however_it_is_reached(name, folder):
    for root in (folder, folder.parent / "link"):
        path = context({}, str(root)).image(name).path
        assert path.startswith(str(root)) and ".." not in path
        assert context({}, str(root)).image(f"{root}/{name}").path == path
    assert context({}, str(folder.parent / "link")).image(f"{folder}/in/a.png").path == f"{folder}/in/a.png"


def test_a_device_is_not_a_picture(folder):
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(DataFault, match="is neither a file nor a folder"):
        context({}, str(folder)).image("pipe.png")


@pytest.mark.parametrize(
    "name",
    ["../x.png", "a/../../x.png", "/x.png", "//x.png", "s3://b/x", "a::memory://x", "a::x", "..", "memory://y/x"],
)
def test_names_below_a_url_stay_below_it(name):
    given = context({}, "memory://data/pictures/")
    assert given.image("a/b.png").path == given.image("memory://data/pictures/a/b.png").path
    with pytest.raises(DataFault) as fault:
        given.image(name)
    assert fault.value.kind == "path_outside"


# --- container files


def test_a_video_file_is_decoded_to_its_drawn_frames(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for n in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * n, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    row = {"video": "clip.mp4", "text": "x"}
    args = FrameSamplerArgs(max_num_frames=4, min_num_frames=4)
    images = [entry.image for entry in entries_of("video", row, folder=str(tmp_path), frames=args) if entry.image]
    shades = [int(np.asarray(decode(image.content))[0, 0, 0]) for image in images]
    assert len(images) == 4 and all(abs(s - 20 * image.number) < 8 for s, image in zip(shades, images, strict=True))
    data = (tmp_path / "clip.mp4").read_bytes()
    as_member = entries_of("video", {"mp4": data, "text": "x"}, frames=args)
    assert [entry.image for entry in as_member if entry.image] == images
    for broken in (data[: len(data) // 2], b"no video", data[:200] + bytes(len(data) - 200)):
        with pytest.raises(DataFault) as fault:
            entries_of("video", {"mp4": broken, "text": "x"}, frames=args)
        assert fault.value.kind == "undecodable_video"


def test_without_the_decoder_a_video_file_is_a_fault_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(DataFault, match=r"clip.mp4 is a container file; .*pip install megabagel\[video\]") as fault:
        entries_of("video", {"video": "clip.mp4", "text": "x"}, folder=str(tmp_path))
    assert fault.value.kind == "video_container"


# --- the page docs/data.md


PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_documented_data_file_is_valid(tmp_path):
    (tmp_path / "data.yaml").write_text(PAGE.split("```yaml\n")[1].split("```")[0])
    groups = load_dataset_groups(str(tmp_path / "data.yaml"))
    assert list(groups) == ["t2i_pretrain", "unified_edit", "vlm_sft", "recipes"]
    assert groups["vlm_sft"].datasets["chats"].data_dir == str(tmp_path / "vlm" / "images")
    assert groups["recipes"].datasets["web"].data_dir == "s3://bucket/recipes"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("t2i_pretrain", "unified_edit")])
def test_the_documented_rows_are_valid(name):
    block = PAGE.split(f"\n**`{name}`**")[1].split("```json\n")[1].split("```")[0]
    for line in block.splitlines():
        assert any(entry.loss for entry in entries_of(name, json.loads(line)))


def test_every_kind_of_fault_is_documented():
    table = PAGE.split("## Bad rows")[1]
    package = Path(__file__).parents[2] / "megabagel"
    raised = {
        kind
        for file in package.rglob("*.py")
        for kind in re.findall(r'Fault\(\s*"([a-z_]+)"', file.read_text(encoding="utf-8"))
    }
    assert len(raised) > 10
    assert {kind for kind in raised if f"`{kind}`" not in table} == set()


def test_the_documented_format_of_your_own_works(tmp_path, monkeypatch):
    code = PAGE.split("## A format of your own")[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    written: dict = {}
    exec(compile(code, "docs/data.md", "exec"), written)
    monkeypatch.setitem(FORMATS, "questions", written["FORMAT"])
    monkeypatch.setattr("megabagel.config.datasets.FORMATS", (*NAMES, "questions"))
    monkeypatch.setattr("megabagel.config.datasets.UND_ONLY", ("questions",))
    rows = [{"picture": "a.png", "question": "What?", "answers": ["a", "b"]}, {"picture": "a.png", "answers": []}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    sizes = {"image_stride": 14, "max_image_size": 56, "min_image_size": 28}
    content = {"questions": {"datasets": {"one": {"path": "rows.json"}}, "image_transform_args": sizes}}
    (tmp_path / "data.yaml").write_text(json.dumps(content))
    source = open_source("questions", load_dataset_groups(str(tmp_path / "data.yaml"))["questions"], SEED)
    drawn = {source.document(0, (0, 0, visit))[2].text for visit in range(20)}
    parts = lay_out(source.document(0, (0, 0, 0)))
    assert drawn == {"a", "b"} and [part.kind for part in parts] == ["vit_image", "text", "text"]
    with pytest.raises(DataFault, match="key answers must be a list"):
        source.document(1, (0, 1, 0))
