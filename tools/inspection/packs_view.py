"""What the page says about one pack: plain dictionaries for the template."""

from dataclasses import dataclass

import numpy as np

from inspection.items import NOT_LEARNT, PackedItem, PackedSample, unpack
from inspection.pictures import attention_svg, image_uri
from megabagel.data.text import FRAME_TOKENS, Tokenizer

NAMES = {"text": "text", "vit": "ViT picture", "vae": "VAE picture, clean", "noised": "VAE picture, noised"}


@dataclass(frozen=True)
class Part:
    """An item before dropout: `text` is given where a dropped text is to be shown."""

    kind: str  # a key of NAMES
    dropped: bool
    text: str | None = None


@dataclass(frozen=True)
class Span:
    """A run of tokens that are alike."""

    text: str
    learnt: bool = False
    frame: bool = False


def view(pack, parts: list[list[Part] | None], tokenizer: Tokenizer, timestep_shift: float) -> dict:
    """`parts`: of each sample, None where they are not known; then what was dropped is not shown."""
    samples = unpack(pack, timestep_shift)
    plan = pack.plan
    learnt = f"{plan.ce_rows.numel():,} text tokens and {plan.mse_rows.numel():,} picture tokens are learnt"
    streams = f"{plan.und_index.numel():,} tokens in the und stream, {plan.gen_index.numel():,} in the gen stream"
    described = [sample_view(s, p, tokenizer) for s, p in zip(samples, parts, strict=True)]
    attention = attention_svg(plan, samples)
    return {
        "tokens": plan.sequence_length,
        "samples": described,
        "attention": attention,
        "summary": f"{streams}; {learnt}.",
    }


def sample_view(sample: PackedSample, parts: list[Part] | None, tokenizer: Tokenizer) -> dict:
    items = [item_view(item, tokenizer) for item in sample.items]
    if parts is not None and sum(not part.dropped for part in parts) == len(items):
        kept = iter(items)
        items = [_dropped(part) if part.dropped else next(kept) for part in parts]
    key = ", ".join(map(str, sample.key))
    return {"group": sample.group, "origin": sample.origin, "key": f"({key})", "tokens": sample.tokens, "items": items}


def item_view(item: PackedItem, tokenizer: Tokenizer) -> dict:
    first, last = item.rope
    facts = [("tokens", f"{item.tokens:,}"), ("RoPE", str(first) if first == last else f"{first:,} to {last:,}")]
    spans, picture, height, width = [], None, 0, 0
    if item.kind == "text":
        spans = text_spans(item, tokenizer)
    else:
        height, width = item.image.shape[-2:]
        picture = image_uri(item.image)
        facts.append(("size", f"{width} × {height}"))
    if item.timestep is not None:
        facts.append(("timestep", f"{item.timestep:.3f}"))
    num_learnt = int((item.labels != NOT_LEARNT).sum())
    if item.learnt:
        facts.append(("learnt", "flow of all its tokens"))
    elif item.kind == "text" and num_learnt:
        facts.append(("learnt", f"{num_learnt:,} tokens"))
    if item.labels[-1] != NOT_LEARNT:
        facts.append(("then learnt", frame_names(tokenizer).get(int(item.labels[-1]), str(item.labels[-1]))))
    if not item.new_split:
        facts.append(("split", "shared with the one before"))
    return {
        "kind": item.kind,
        "name": NAMES[item.kind],
        "facts": facts,
        "timestep": item.timestep,
        "spans": spans,
        "picture": picture,
        "width": width,
        "height": height,
        "dropped": False,
    }


def text_spans(item: PackedItem, tokenizer: Tokenizer) -> list[Span]:
    """A token is learnt where the position before it has it as its label."""
    learnt = np.concatenate([[False], item.labels[:-1] != NOT_LEARNT])
    frames = frame_names(tokenizer)
    spans: list[Span] = []
    run: list[int] = []

    def close(end: int) -> None:
        if run:
            spans.append(Span(tokenizer.decode(run), learnt=bool(learnt[end - 1])))
            run.clear()

    for place, token in enumerate(item.ids.tolist()):
        if token in frames:
            close(place)
            spans.append(Span(frames[token], bool(learnt[place]), frame=True))
            continue
        if run and learnt[place] != learnt[place - 1]:
            close(place)
        run.append(token)
    close(len(item.ids))
    return spans


def frame_names(tokenizer: Tokenizer) -> dict[int, str]:
    """Token id -> name of the four frame tokens."""
    return dict(zip(vars(tokenizer.special).values(), FRAME_TOKENS, strict=True))


def _dropped(part: Part) -> dict:
    return {
        "kind": part.kind,
        "name": NAMES[part.kind],
        "facts": [("dropped", "this visit, for guidance")],
        "timestep": None,
        "spans": [Span(part.text if part.text is not None else "a picture")],
        "picture": None,
        "dropped": True,
    }
