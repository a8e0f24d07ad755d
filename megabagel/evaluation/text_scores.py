"""Answers against reference texts: BLEU, ROUGE, METEOR, CIDEr and BERTScore, each by its well-known library.

Numbers only; which of them a task wants, and where answers come from, is decided elsewhere.
"""

import io
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from megabagel.config.errors import ConfigError
from megabagel.evaluation.extra import library

_WORDS = re.compile(r"\w+|[^\w\s]")


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of sacrebleu with its defaults, 0 .. 100; each answer may have any number of references."""
    streams = [[of[n] if n < len(of) else None for of in references] for n in range(max(map(len, references)))]
    return library("sacrebleu").corpus_bleu(list(answers), streams).score


def rouge(answer: str, references: Sequence[str]) -> dict[str, float]:
    """F-measures `rouge1`, `rouge2`, `rougeL` of rouge-score with stemming, 0 .. 1; of the best reference each."""
    scorer = library("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    return {name: score.fmeasure for name, score in scorer.score_multi(list(references), answer).items()}


def words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return _WORDS.findall(text.lower())


def wordnet(folder: str):
    """NLTK's reader of a WordNet 3 folder: NLTK's `corpora/wordnet`, or the one of Debian's package wordnet-base.

    The latter lacks the names of lexicographer files and the numbers of senses, neither of which METEOR looks at.
    """
    if not (Path(folder) / "data.noun").is_file():
        raise ConfigError(f"models.wordnet: {folder} holds no data.noun; give a WordNet folder, see --wordnet.")
    base = library("nltk.corpus.reader.wordnet").WordNetCorpusReader

    class Reader(base):
        def open(self, file):
            if file == "lexnames":
                return io.StringIO("".join(f"{number:02d} file{number} 1\n" for number in range(45)))
            return super().open(file)

        def map_wn(self, version="wordnet"):
            return None

        def add_omw(self):
            """No other languages."""

    path = str(Path(folder).absolute())
    allowed = library("nltk.data").path
    if path not in allowed:
        allowed.append(path)
    return Reader(path, None)


def meteor(answer: str, references: Sequence[str], reader) -> float:
    """NLTK's METEOR over `words`, 0 .. 1; `reader`: see `wordnet`.

    NLTK looks for synonyms among stems, so that few are found; the Java program METEOR 1.5 gives other numbers.
    """
    score = library("nltk.translate.meteor_score").meteor_score
    return score([words(reference) for reference in references], words(answer), wordnet=reader)


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """CIDEr-D of pycocoevalcap over all answers, and of each; 0 .. 10, in papers times 100.

    Words are split by the Penn Treebank tokenizer, a Java program. Document frequencies are those of these references.
    """
    require_java()
    split = library("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer().tokenize
    given = split({number: [{"caption": text} for text in texts] for number, texts in enumerate(references)})
    # a last line without any word would be lost
    found = split({number: [{"caption": text or "."}] for number, text in enumerate(answers)})
    score, each = library("pycocoevalcap.cider.cider").Cider().compute_score(given, found)
    return float(score), [float(value) for value in each]


def require_java() -> None:
    """Raises ConfigError where CIDEr's tokenizer cannot run."""
    if shutil.which("java") is None:
        raise ConfigError("score cider needs Java, which its tokenizer is written in; install it or remove the score.")


class BertScore:
    """BERTScore (Zhang et al. 2020) by torchmetrics with the encoder in `folder`, a transformers model.

    The last layer counts, unless `layer` names another one, numbered from 1; no baseline is subtracted.
    """

    def __init__(self, folder: str, layer: int | None, device) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._score = library("torchmetrics.functional.text.bert").bert_score
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        self._length = min(512, self._tokenizer.model_max_length, self._model.config.max_position_embeddings)
        self._layer, self._device = layer, device

    def __call__(self, answer: str, references: Sequence[str]) -> float:
        """F1 of the best reference, at most 1."""
        return max(self._f1(answer, reference) for reference in references)

    def _f1(self, answer: str, reference: str) -> float:
        values = self._score(
            [answer],
            [reference],
            model=self._model,
            user_tokenizer=self._tokenizer,
            user_forward_fn=self._embed,
            device=self._device,
            max_length=self._length,
            truncation=True,
        )
        return float(values["f1"])

    def _embed(self, model, batch):
        layers = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        return layers.hidden_states[-1 if self._layer is None else self._layer]
