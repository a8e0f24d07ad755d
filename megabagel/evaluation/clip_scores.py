"""Pictures against texts, by a CLIP model: CLIP score (Hessel et al. 2021) and which of several texts fits best."""

from collections.abc import Sequence

import torch
from PIL import Image

from megabagel.config.errors import ConfigError


class Clip:
    """The model and its processors in a transformers folder."""

    def __init__(self, folder: str, device) -> None:
        import transformers

        # the other image processor of recent versions needs torchvision
        is_recent = hasattr(transformers, "CLIPImageProcessorPil")
        processor = transformers.CLIPImageProcessorPil if is_recent else transformers.CLIPImageProcessor
        try:
            self._model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._processor = processor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"models.clip: {folder} is no CLIP folder ({reason}); see --clip.") from None
        self._device = device

    @torch.no_grad()
    def similarities(self, image: Image.Image, texts: Sequence[str]) -> list[float]:
        """Cosines between the embeddings of the picture and of each text."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        pixels = self._processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        output = self._model(
            input_ids=tokens["input_ids"].to(self._device),
            attention_mask=tokens["attention_mask"].to(self._device),
            pixel_values=pixels.to(self._device),
        )
        cosines = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        return cosines.float().tolist()


def clip_score(cosine: float) -> float:
    """100 times the cosine, never negative."""
    return max(0.0, 100.0 * cosine)
