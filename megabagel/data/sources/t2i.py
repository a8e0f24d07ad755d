"""Text-to-image parquet: columns `image` (encoded bytes) and `captions` (JSON string, name -> caption)."""

import json

from megabagel.config.datasets import GroupConfig
from megabagel.data.faults import DataFault
from megabagel.data.images import decode, to_pixels
from megabagel.data.parquet import ROW_GROUPS_IN_MEMORY, ParquetRows
from megabagel.data.sample import Item, Sample
from megabagel.data.text import Tokenizer
from megabagel.runtime import rng


class T2ISource:
    """A caption, drawn anew at each visit, then its picture with the flow loss."""

    window = ROW_GROUPS_IN_MEMORY

    def __init__(self, name: str, group: GroupConfig, tokenizer: Tokenizer, seed: int) -> None:
        self._name, self._tokenizer, self._seed = name, tokenizer, seed
        self._transform = group.image_transform_args
        self._rows = ParquetRows(group.datasets, ["image", "captions"], group.num_used_data)
        self.blocks, self.faults, self.origin = self._rows.blocks, self._rows.faults, self._rows.origin

    def sample(self, row: int, key: tuple[int, ...]) -> Sample:
        """Raises DataFault when the row cannot be used."""
        content = self._rows[row]
        caption = self._draw_caption(content["captions"], key)
        pixels = to_pixels(decode(content["image"] or b""), self._transform)
        items = [
            Item("text", enable_cfg=True, text_ids=self._tokenizer.encode(caption)),
            Item("vae_image", loss=True, pixels=pixels),
        ]
        return Sample(items, key, self._name, self.origin(row))

    def _draw_caption(self, captions: str | None, key: tuple[int, ...]) -> str:
        try:
            choices = json.loads(captions or "")
        except ValueError as error:
            raise DataFault("broken_json", f"column captions is not valid JSON ({error})") from None
        if not isinstance(choices, dict) or not all(isinstance(value, str) for value in choices.values()):
            raise DataFault("broken_json", "column captions must be a JSON object of strings, name -> caption")
        if not choices:
            return " "
        return list(choices.values())[int(rng.integers(self._seed, "caption", key, 0, len(choices)))]
