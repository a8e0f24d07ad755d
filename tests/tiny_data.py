"""A few real-format samples on disk for tests: T2I and editing parquet, VLM jsonl, and the data file over them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "public-basic" / "ckpt"  # BAGEL folder: tokenizer, autoencoder (stride 8), ViT patch 14

VAE_ARGS = {"image_stride": 16, "max_image_size": 64, "min_image_size": 32}
VIT_ARGS = {"image_stride": 14, "max_image_size": 56, "min_image_size": 28}
WORDS = "a red cat sits near the harbor and golden tree glows".split()


def _picture(draw: np.random.Generator) -> Image.Image:
    width, height = draw.integers(30, 70, 2)
    coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _text(draw: np.random.Generator) -> str:
    return " ".join(draw.choice(WORDS, int(draw.integers(1, 8))))


GROUPS = ("t2i_pretrain", "unified_edit", "vlm_sft")


def write_data(folder: Path, groups: tuple[str, ...] = GROUPS, rows: int = 24) -> Path:
    """Write `rows` samples per group and the data file; returns the data file's path. A vlm_sft row is text-only at
    times. The group `text` is vlm_sft without any picture."""
    draw = np.random.default_rng(7)
    content = {}
    for group in groups:
        home = folder / group
        home.mkdir(parents=True)
        if group == "t2i_pretrain":
            pictures = [_png(_picture(draw)) for _ in range(rows)]
            captions = [json.dumps({"short": _text(draw), "long": _text(draw)}) for _ in range(rows)]
            pq.write_table(pa.table({"image": pictures, "captions": captions}), home / "a.parquet", row_group_size=8)
            content[group] = {"datasets": {"tiny": {"data_dir": group}}, "image_transform_args": VAE_ARGS}
        elif group == "unified_edit":
            lists = [[_png(_picture(draw)) for _ in range(int(draw.integers(2, 4)))] for _ in range(rows)]
            orders = [[[_text(draw), _text(draw)] for _ in pictures[1:]] for pictures in lists]
            table = pa.table({"image_list": lists, "instruction_list": orders})
            pq.write_table(table, home / "a.parquet", row_group_size=8)
            content[group] = {
                "datasets": {"tiny": {"data_dir": group}},
                "image_transform_args": VAE_ARGS,
                "vit_image_transform_args": VIT_ARGS,
            }
        else:
            lines = []
            for row in range(rows):
                turns = [("human", _text(draw)), ("gpt", _text(draw)), ("human", _text(draw)), ("gpt", _text(draw))]
                line = {"conversations": [{"from": who, "value": text} for who, text in turns]}
                if group == "vlm_sft" and row % 3:
                    _picture(draw).save(home / f"{row}.png")
                    line["image"] = f"{row}.png"
                    line["conversations"][0]["value"] = "<image>" + line["conversations"][0]["value"]
                lines.append(json.dumps(line))
            (home / "rows.jsonl").write_text("\n".join(lines) + "\n")
            content["vlm_sft"] = {
                "datasets": {"tiny": {"data_dir": group, "jsonl_path": f"{group}/rows.jsonl"}},
                "image_transform_args": VIT_ARGS,
            }
    for index, group in enumerate(content.values()):
        group |= {"dataset_names": ["tiny"], "is_mandatory": index == 0, "weight": 1.0}
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def training_options(data_file: Path, run_dir: Path, steps: int = 3) -> list[str]:
    """Options of `megabagel.train` for a small fp32 run of the golden checkpoint on that data."""
    options = {
        "model.folder": CHECKPOINT,
        "checkpoint.init_from": CHECKPOINT,
        "checkpoint.run_dir": run_dir,
        "checkpoint.save_interval": 0,
        "data.dataset_config_file": data_file,
        "data.expected_num_tokens": 150,
        "data.max_num_tokens": 260,
        "data.max_num_tokens_per_sample": 200,
        "data.prefer_buffer_before": 75,
        "data.num_workers": 0,
        "optimizer.lr": 1e-3,
        "optimizer.lr_warmup_steps": 0,
        "optimizer.ema_decay": 0.9,
        "training.params_dtype": "fp32",
        "training.train_steps": steps,
        "training.global_batch_size": 2,
        "logging.progress_bar": "false",
    }
    return [f"--{key}={value}" for key, value in options.items()]
