"""What the demo's model has learned: three scores with their baselines, and a contact sheet, in RUN_DIR/results.

Emojis from their names (training prompts: this measures memory), edits of held-out emojis, and easy-vqa's test
questions. For the demo's own data only; scores of other models are megabagel.evaluate's.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.torch_dist import checkpoint_folder
from megabagel.config.errors import ConfigError
from megabagel.data.faults import DataError
from megabagel.inference import FlowSettings, Generator, load
from megabagel.models.autoencoder import AutoencoderError
from megabagel.runtime import distributed
from tools.demo import report
from tools.demo.answers import accuracies, ask, from_the_question_alone, read_questions
from tools.demo.pictures import DRAWS, EDIT_FLOW, OTHERS, T2I_FLOW, edits, text_to_image

EXAMPLE = """example (about a minute):
  python tools/demo_results.py runs/demo
"""


def measure(bagel: Generator, data: Path, step: int, weights: str, every: int, sheet: Path) -> dict:
    """The scores, as they go to results.json; draws the contact sheet. `every`: one of so many test questions."""
    start = time.perf_counter()
    prompts = text_to_image(bagel, data)
    drawn = time.perf_counter()
    edited = edits(bagel, data)
    changed = time.perf_counter()
    vlm = data / "vlm"
    questions = read_questions(vlm / "vlm_single_val.jsonl")[::every]
    answers = ask(bagel, questions, vlm / "images")
    asked = time.perf_counter()
    alone = from_the_question_alone(read_questions(vlm / "vlm.jsonl"), questions)
    report.draw_sheet(prompts, edited, questions, answers, vlm / "images", sheet)
    return {
        "step": step,
        "weights": weights,
        "t2i": {
            **prompts.scores(),
            "seconds": drawn - start,
            "how": "training prompts, so this is memorisation: nearest of all training pictures in latent space, "
            + _flow(T2I_FLOW),
        },
        "edit": {
            **edited.scores(),
            "seconds": changed - drawn,
            "of_tones": edited.scores("skin"),
            "how": f"held-out emojis, {DRAWS} pictures of each edit: nearest of target, source, its other variants and "
            f"{OTHERS} others, " + _flow(EDIT_FLOW),
        },
        "vqa": {
            "count": len(questions),
            "accuracy": accuracies(questions, answers),
            "question_only": accuracies(questions, alone),
            "seconds": asked - changed,
            "how": f"easy-vqa's test split, one of {every} questions, each asked alone, greedy decoding; baseline: the "
            "usual answer to the question in training, without the picture",
        },
    }


def _flow(settings: FlowSettings) -> str:
    scales, (low, high) = settings.guidance, settings.guidance.interval
    return (
        f"{settings.num_timesteps - 1} flow steps, CFG {scales.text_scale:g} by text and {scales.image_scale:g} by "
        f"picture at times {low:g} to {high:g}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="run folder of the demo, or one of its iter_... folders")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="what tools/prepare_demo.py wrote")
    parser.add_argument("--out", type=Path, help="default: RUN_DIR/results")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="moving average or live weights")
    parser.add_argument("--every", type=int, default=2, help="ask one of so many test questions (default: 2); 1: all")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.run_dir / "results"
    torch.set_num_threads(1)  # thousands of small operations: a second thread would mostly wait
    try:
        bagel = load(arguments.run_dir, load_ema=arguments.weights == "ema")
        step = int(checkpoint_folder(arguments.run_dir).name.removeprefix("iter_"))
    except (ConfigError, DataError, CheckpointError, AutoencoderError) as error:
        print(f"demo_results: {error}", file=sys.stderr)
        return 1
    results = measure(bagel, arguments.data, step, arguments.weights, arguments.every, out / "contact_sheet.png")
    report.write(results, out)
    print(report.summary(results, out))
    distributed.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
