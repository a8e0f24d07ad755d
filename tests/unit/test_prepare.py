"""Documents to planned samples: the same from headers as from pixels, over-long rules, faults for whatever is wrong."""

import io
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megabagel.config.datasets import GroupConfig, ImageTransformArgs
from megabagel.config.schema import DataConfig
from megabagel.data import prepare
from megabagel.data.document import Entry, ImageSource
from megabagel.data.faults import DataFault
from megabagel.data.images import decode, resize, target_size
from megabagel.data.over_long import cut_lengths, shrunk
from megabagel.data.prepare import Preparer, _pixel_sizes, pixel_bytes
from megabagel.data.text import Tokenizer
from megabagel.packing.geometry import Geometry
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import VAE, VIT, draw_dropout, plan_sample
from tests.unit.data_fixtures import DROPOUT_OFF, TOKENIZER, TRANSFORM, VIT_TRANSFORM, png

TOKENS = Tokenizer(TOKENIZER)
GEOMETRY = Geometry(16, 8, 14, 8, TOKENS.special)
GROUPS = {
    "edits": GroupConfig({}, TRANSFORM, format="unified_edit", vit_image_transform_args=VIT_TRANSFORM),
    "pairs": GroupConfig({}, TRANSFORM, format="t2i_pretrain"),
    "chats": GroupConfig({}, VIT_TRANSFORM, format="vlm_sft"),
}
EDITS, PAIRS, CHATS = range(3)
KEY = (EDITS, 5, 0)


def preparer(known=None, visual_gen: bool = True, **fields) -> Preparer:
    config = DataConfig(**{**DROPOUT_OFF, **fields})
    return Preparer(GROUPS, config, TOKENS, GEOMETRY, visual_gen=visual_gen, known=known)


def noise(number: int, width: int, height: int, format: str = "PNG", **options) -> ImageSource:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return ImageSource(number, content=buffer.getvalue())


def edit(width: int = 40, height: int = 25) -> list[Entry]:
    return [
        Entry(image=noise(0, width, height)),
        Entry(text="make it red and blue"),
        Entry(image=noise(1, height, width), loss=True),
    ]


def chat(*texts: str, pictures: int = 0) -> list[Entry]:
    shown = [Entry(image=noise(n, 40, 28)) for n in range(pictures)]
    return [*shown, *(Entry(text=text, loss=i % 2 == 1) for i, text in enumerate(texts))]


def fault(call, *arguments) -> DataFault:
    with pytest.raises(DataFault) as raised:
        call(*arguments)
    return raised.value


def test_measuring_headers_gives_what_planning_from_pixels_gives():
    entries, probabilities = edit(), {"text": 0.5, "vit_image": 0.5, "vae_image": 0.5}
    source, result = (decode(entries[i].image.content) for i in (0, 2))
    items = [
        Item("vae_image", enable_cfg=True, pixels=resize(source, target_size(40, 25, TRANSFORM))),
        Item("vit_image", enable_cfg=True, pixels=resize(source, target_size(40, 25, VIT_TRANSFORM))),
        Item("text", enable_cfg=True, text_ids=TOKENS.encode("make it red and blue")),
        Item("vae_image", loss=True, pixels=resize(result, target_size(25, 40, TRANSFORM))),
    ]
    kept = set()
    ours = preparer(**{f"{kind}_cond_dropout_prob": 0.5 for kind in ("text", "vit", "vae")}, seed=3)
    for visit in range(12):
        sample = Sample(items, (EDITS, 5, visit), "edits", "here")
        expected = plan_sample(sample, GEOMETRY, draw_dropout(sample, probabilities, 3), seed=3)
        planned = ours.measure(EDITS, entries, sample.key, "here")
        assert [*map(repr, planned.pieces)] == [*map(repr, expected.pieces)]
        assert (planned.key, planned.group, planned.origin) == (sample.key, "edits", "here")
        assert {*planned.vit_pixels, *planned.vae_pixels} == {None}
        read = ours.read(planned, EDITS, entries)
        for kind in ("vit_pixels", "vae_pixels"):
            pairs = zip(getattr(read, kind), getattr(expected, kind), strict=True)
            assert all(np.array_equal(a, b) and a.dtype == np.uint8 for a, b in pairs)
        assert pixel_bytes(planned, GEOMETRY) == sum(p.nbytes for p in read.vit_pixels + read.vae_pixels)
        kept.add(len(planned.pieces))
    assert len(kept) > 1


def test_a_preparer_can_be_sent_to_a_worker(tmp_path):
    ours = preparer(token_cache=str(tmp_path))
    theirs = pickle.loads(pickle.dumps(ours))
    assert repr(theirs.measure(EDITS, edit(), KEY, "x")) == repr(ours.measure(EDITS, edit(), KEY, "x"))


def test_a_picture_that_enters_twice_is_opened_once_for_each_step(monkeypatch):
    calls = []
    for name in ("decode", "header_size"):
        function = getattr(prepare, name)
        monkeypatch.setattr(prepare, name, lambda *a, f=function, n=name: (calls.append(n), f(*a))[1])
    ours, entries = preparer(), edit()
    planned = ours.measure(EDITS, entries, KEY, "x")
    assert calls == ["header_size"] * 2 and len(planned.pieces) == 4
    ours.read(planned, EDITS, entries)
    assert calls == ["header_size"] * 2 + ["decode"] * 2


def test_pictures_share_the_pixel_budget_only_where_none_is_generated(monkeypatch):
    small = replace(VIT_TRANSFORM, max_pixels=28 * 28)
    monkeypatch.setattr(GROUPS["chats"], "image_transform_args", small)
    ours = preparer()
    two = ours.measure(CHATS, chat("which?", "this", pictures=2), (CHATS, 0, 0), "x")
    one = ours.measure(CHATS, chat("which?", "this", pictures=1), (CHATS, 0, 0), "x")
    assert [p.grid for p in two.pieces if p.grid] == [(1, 1)] * 2
    assert [p.grid for p in one.pieces if p.grid] == [(1, 2)]
    monkeypatch.setattr(GROUPS["edits"], "image_transform_args", replace(TRANSFORM, max_pixels=32 * 48))
    edits = ours.measure(EDITS, edit(), KEY, "x")
    assert edits.pieces[0].grid == (2, 2)


def test_pictures_turned_by_exif_are_measured_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    entries = [Entry(text="x"), Entry(image=noise(0, 60, 30, "JPEG", exif=exif), loss=True)]
    ours = preparer()
    planned = ours.measure(PAIRS, entries, (PAIRS, 0, 0), "x")
    assert planned.pieces[1].grid == (4, 2)
    assert ours.read(planned, PAIRS, entries).vae_pixels[0].shape == (64, 32, 3)


class Stored:
    """Knows the size of picture 0 and an encoding of it for the autoencoder."""

    def size(self, row, number):
        return (40, 25) if (row, number) == (5, 0) else None

    def lookup(self, row, number, kind, size):
        return np.full((2, 3), 7.0) if (row, number, kind) == (5, 0, "vae_image") else None

    def bytes_per_pixel(self, kind):
        return {"vit_image": 23.5, "vae_image": 2.0}[kind]


def test_what_is_stored_counts_as_it_will_be_in_memory():
    planned = preparer().measure(EDITS, edit(), KEY, "x")
    pixels = {kind: sum(h * w for h, w in sizes) for kind, sizes in _pixel_sizes(planned, GEOMETRY).items()}
    assert pixels[VIT] and pixels[VAE]
    assert pixel_bytes(planned, GEOMETRY) == 3 * (pixels[VIT] + pixels[VAE])
    # some pictures may not be stored: never less than pixels take
    assert pixel_bytes(planned, GEOMETRY, Stored()) == math.ceil(23.5 * pixels[VIT] + 3 * pixels[VAE])


def test_known_sizes_and_stored_encodings_spare_the_picture():
    ours, entries = preparer(known=[Stored(), None, None]), edit()
    expected = preparer().measure(EDITS, entries, KEY, "x")
    unopened = [replace(entries[0], image=ImageSource(0, path="/nowhere.png")), *entries[1:]]
    planned = ours.measure(EDITS, unopened, KEY, "x")
    assert repr(planned) == repr(expected)
    read = ours.read(planned, EDITS, entries)
    assert (read.vae_pixels[0] == 7).all() and read.vae_pixels[1].dtype == np.uint8
    assert np.array_equal(read.vit_pixels[0], preparer().read(expected, EDITS, entries).vit_pixels[0])


def test_over_long_samples_are_skipped_with_the_limit_named():
    found = fault(preparer(max_num_tokens_per_sample=10).measure, EDITS, edit(), KEY, "x")
    assert found.kind == "over_long" and "more than data.max_num_tokens_per_sample = 10" in str(found)


@pytest.mark.parametrize("most", range(12, 60, 7))
def test_truncation_cuts_the_ends_of_the_longest_texts_to_an_exact_fit(most):
    texts = "short", "one two three four five six seven eight", "a longer text than the others " * 3
    whole = preparer().measure(CHATS, chat(*texts), (CHATS, 0, 0), "x")
    ours = preparer(max_num_tokens_per_sample=most, over_long="truncate_text")
    planned = ours.measure(CHATS, chat(*texts), (CHATS, 0, 0), "x")
    assert planned.num_tokens == min(most, whole.num_tokens)
    before, after = ([p.text_ids.tolist() for p in s.pieces] for s in (whole, planned))
    assert all(ids == longer[: len(ids)] and ids for ids, longer in zip(after, before, strict=True))
    longest = max(map(len, after))
    assert all(len(ids) >= longest - 1 for ids, longer in zip(after, before, strict=True) if len(ids) < len(longer))


def test_truncation_keeps_one_token_of_each_text_and_never_touches_pictures():
    ours = preparer(max_num_tokens_per_sample=17, over_long="truncate_text")
    entries = [Entry(text="many words " * 9), Entry(image=noise(0, 64, 64), loss=True)]
    found = fault(ours.measure, PAIRS, entries, (PAIRS, 0, 0), "x")
    assert found.kind == "over_long"
    planned = preparer(max_num_tokens_per_sample=21, over_long="truncate_text").measure(
        PAIRS, entries, (PAIRS, 0, 0), "x"
    )
    assert [p.length for p in planned.pieces] == [3, 18]


def test_shrinking_halves_all_pictures_alike_until_the_sample_fits():
    entries = [
        Entry(image=noise(0, 64, 64)),
        Entry(text="x"),
        Entry(image=noise(1, 64, 32), loss=True),
    ]
    whole = preparer().measure(EDITS, entries, KEY, "x")
    ours = preparer(max_num_tokens_per_sample=29, over_long="shrink_image")
    planned = ours.measure(EDITS, entries, KEY, "x")
    assert [p.grid for p in whole.pieces if p.grid] == [(4, 4), (4, 4), (2, 4)]
    assert whole.num_tokens > 29 >= planned.num_tokens
    assert [p.grid for p in planned.pieces if p.grid] == [(2, 2), (2, 2), (1, 2)]
    read = ours.read(planned, EDITS, entries)
    assert [p.shape for p in read.vae_pixels] == [(32, 32, 3), (16, 32, 3)]
    hopeless = preparer(max_num_tokens_per_sample=11, over_long="shrink_image")
    assert fault(hopeless.measure, EDITS, entries, KEY, "x").kind == "over_long"


def test_texts_too_large_to_tokenise_are_over_long_at_once():
    entries = [Entry(text="word " * 3_000_000, loss=True)]
    found = fault(preparer(max_num_tokens_per_sample=100).measure, CHATS, entries, (CHATS, 0, 0), "x")
    assert found.kind == "over_long" and "15000000 bytes" in str(found)
    cut = preparer(max_num_tokens_per_sample=100, over_long="truncate_text")
    assert cut.measure(CHATS, entries, (CHATS, 0, 0), "x").num_tokens == 100


def test_lengths_are_cut_from_the_longest():
    assert cut_lengths([3, 10, 7], 5) == [3, 6, 6]
    assert cut_lengths([3, 10, 7], 6) == [3, 6, 5]
    assert cut_lengths([0, 4, 4], 6) == [0, 1, 1]
    assert cut_lengths([0, 4, 4], 7) is None and cut_lengths([], 1) is None
    assert [shrunk(64, 16, 16, n) for n in range(4)] == [(64, 16), (48, 16), (32, 16), (16, 16)]


@pytest.mark.parametrize(
    "entries, said",
    [
        ([], "neither text nor pictures"),
        ([Entry(text=7)], "of type int, it must be a string"),
        ([Entry(text=b"x")], "of type bytes"),
        ([Entry()], "of type NoneType"),
        ([Entry(text="a \ud800 b")], "not valid Unicode"),
        ([Entry(image=ImageSource(0)), Entry(text="x")], "picture 0 is of type NoneType"),
        ([Entry(image=ImageSource(0, content=5)), Entry(text="x")], "picture 0 is of type int"),
        ([Entry(text="x"), Entry(image=noise(0, 9, 9), loss=True)], "used as vae_image, but its group says no size"),
    ],
)
def test_wrong_content_is_a_fault_of_the_row(entries, said):
    found = fault(preparer().measure, CHATS, entries, (CHATS, 0, 0), "x")
    assert found.kind == "bad_row" and said in str(found)


def test_a_model_without_pictures_out_refuses_documents_that_generate():
    assert "model.visual_gen is false" in str(fault(preparer(visual_gen=False).measure, EDITS, edit(), KEY, "x"))


def test_what_only_decoding_shows_is_found_by_read():
    content = noise(0, 64, 64).content
    broken = [Entry(text="x"), Entry(image=ImageSource(0, content=content[: len(content) // 2]), loss=True)]
    ours = preparer()
    planned = ours.measure(PAIRS, broken, (PAIRS, 0, 0), "x")
    assert fault(ours.read, planned, PAIRS, broken).kind == "undecodable_image"


def test_a_picture_that_changed_since_it_was_measured_is_a_fault(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(png(1, (64, 32)))
    entries = [Entry(text="x"), Entry(image=ImageSource(0, path=str(file)), loss=True)]
    for policy in ("skip", "shrink_image"):
        ours = preparer(over_long=policy)
        planned = ours.measure(PAIRS, entries, (PAIRS, 0, 0), "x")
        assert ours.read(planned, PAIRS, entries).vae_pixels[0].shape == (32, 64, 3)
        file.write_bytes(png(1, (32, 64)))
        assert fault(ours.read, planned, PAIRS, entries).kind == "changed_image"
        file.write_bytes(png(1, (64, 32)))


def test_sizes_that_do_not_fit_the_model_are_named():
    groups = {"pairs": GroupConfig({}, ImageTransformArgs(16, 512, 16), format="t2i_pretrain")}
    ours = Preparer(groups, DataConfig(**DROPOUT_OFF), TOKENS, GEOMETRY)
    entries = [Entry(text="x"), Entry(image=noise(0, 200, 20), loss=True)]
    found = fault(ours.measure, 0, entries, (0, 0, 0), "x")
    assert found.kind == "bad_row" and str(found).startswith("vae_image of ") and "max_image_size" in str(found)
