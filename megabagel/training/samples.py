"""Pictures and answers of the model in training, to a fixed list of requests with fixed seeds.

Forward only: weights, gradients and generators stay as they are. When samples are due is the training loop's matter.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from torch import nn

from megabagel.config.paths import tokenizer_path
from megabagel.config.requests import Request, read_entries
from megabagel.config.schema import Config
from megabagel.data.images import decode
from megabagel.data.text import Tokenizer
from megabagel.evaluation.contact_sheet import contact_sheet, in_columns
from megabagel.inference import FlowSettings, Generator, Guidance, TextSettings
from megabagel.inference.network import Network
from megabagel.inference.png import save_png
from megabagel.models.autoencoder import Autoencoder
from megabagel.models.fp8_history import forgotten
from megabagel.packing.geometry import geometry_of
from megabagel.runtime.distributed import Layout, gather_objects
from megabagel.runtime.overlap import whole_parameters
from megabagel.training.ema import ShardedEma

SAMPLES_FOLDER = "samples"  # in the run folder


@dataclass(frozen=True)
class Sample:
    """What a request got: `number` counts requests from 0; one of picture and answer is None."""

    number: int
    request: Request
    picture: Image.Image | None = None
    answer: str | None = None


class Sampling:
    """`make` at any time between two steps, on every rank; replicas share the requests. No pipeline, no expert
    parallelism."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        stages: list[nn.Module],
        ema: ShardedEma | None,
        autoencoder: Autoencoder | None,
    ) -> None:
        """`stages`: the one, wrapped for data parallelism. Raises ConfigError, DataError."""
        self._config, self._layout, self._stages, self._ema = config.samples, layout, stages, ema
        self._run_dir = Path(config.checkpoint.run_dir)
        tokenizer = Tokenizer(tokenizer_path(config))
        network = Network(stages[0].module, geometry_of(config.model, tokenizer.special))
        self._generator = Generator(network, tokenizer, autoencoder)
        self._requests = read_entries(self._config.prompts_file, Request, "samples.prompts_file")

    def make(self, step: int) -> list[Sample]:
        """In order of the requests, written to RUN_DIR/samples too; empty but on the first rank of the first replica.

        Raises DataFault for a picture that cannot be decoded.
        """
        layout = self._layout
        with self._weights(), forgotten(self._stages):
            self._stages[0].eval()
            try:
                made = self._respond(range(layout.dp_rank, len(self._requests), layout.dp_size))
            finally:
                self._stages[0].train()
        if not layout.is_source:
            return []
        parts = gather_objects(layout.sources_group, made)
        if layout.dp_rank > 0:
            return []
        samples = sorted((sample for part in parts for sample in part), key=lambda sample: sample.number)
        write(samples, self._run_dir / SAMPLES_FOLDER / f"step_{step:07d}", step, self._config.seed)
        return samples

    @contextlib.contextmanager
    def _weights(self) -> Iterator[None]:
        with whole_parameters(self._stages) if self._config.weights == "model" else self._ema.applied():
            yield

    def _respond(self, numbers: Sequence[int]) -> list[Sample]:
        """To the requests of these numbers."""
        wanted, made = self._config, []
        guidance = Guidance(wanted.cfg_text_scale, wanted.cfg_img_scale)
        flow = FlowSettings(wanted.num_timesteps, wanted.timestep_shift, guidance)
        for batch in batches(self._requests, numbers, wanted.batch_size):
            requests = [self._requests[number] for number in batch]
            prompts = [[*map(decode, request.images), request.text] for request in requests]
            seeds = [wanted.seed + number for number in batch]
            if requests[0].draws:
                size = {"height": requests[0].height, "width": requests[0].width}
                drawn = self._generator.pictures(prompts, flow, seeds=seeds, **size)
                pairs = zip(batch, requests, drawn, strict=True)
                made += [Sample(number, request, picture=one.image) for number, request, one in pairs]
            else:
                answers = self._generator.answers(prompts, TextSettings(wanted.max_tokens), seeds=seeds)
                pairs = zip(batch, requests, answers, strict=True)
                made += [Sample(number, request, answer=answer) for number, request, answer in pairs]
        return made


def batches(requests: Sequence[Request], numbers: Sequence[int], size: int) -> list[list[int]]:
    """`numbers` of `requests` in groups of at most `size` that ask for the same: a text, or pictures of one size."""
    alike: dict[tuple, list[int]] = {}
    for number in numbers:
        request = requests[number]
        alike.setdefault((request.draws, request.height, request.width), []).append(number)
    return [group[start : start + size] for group in alike.values() for start in range(0, len(group), size)]


def write(samples: Sequence[Sample], folder: Path, step: int, seed: int) -> None:
    """Pictures, `samples.jsonl` and the contact sheet `sheet.png`; what an earlier run wrote there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, rows, captions = [], [], []
    for sample in samples:
        line = {"number": sample.number, "step": step, **asdict(sample.request), "answer": sample.answer}
        if sample.picture is not None:
            line["picture"] = f"{sample.number:03d}.png"
            settings = {"step": step, "images": sample.request.images}
            save_png(sample.picture, folder / line["picture"], sample.request.text, seed + sample.number, settings)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        shown = list(map(decode, sample.request.images))
        rows.append([*shown, sample.picture or sample.answer])
        captions.append([*[""] * (len(rows[-1]) - 1), sample.request.text])
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    rows, captions = in_columns(rows, captions, 8)
    contact_sheet(rows, folder / "sheet.png", captions)
