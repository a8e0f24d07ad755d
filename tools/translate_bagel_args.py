"""Translates an official BAGEL training command into a configuration, and its data YAML with dataset_info.py into ours.

The command is read as text, out of a shell script or as arguments behind `--`; dataset_info.py is parsed, never run.
Official defaults that differ from ours are written out. Every flag without an equivalent is named with the reason.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

from migration.command import SCRIPT, CommandError, read_command  # noqa: E402
from migration.flags import Translation, translate  # noqa: E402
from migration.registry import translate_data  # noqa: E402

from megabagel.config.folder import LLM_KEYS, VIT_KEYS  # noqa: E402

EXAMPLE = f"""examples:
  python tools/translate_bagel_args.py --script train.sh --dataset-info data/dataset_info.py --out run.yaml
  python tools/translate_bagel_args.py --out run.yaml -- torchrun --nproc_per_node=8 train/{SCRIPT} --lr 2e-5
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", type=Path, metavar="FILE", help="shell script with the command")
    parser.add_argument("--dataset-info", type=Path, metavar="FILE", help="the official data/dataset_info.py")
    parser.add_argument("--dataset-config", type=Path, metavar="FILE", help="data YAML, if not where the command says")
    parser.add_argument("--out", type=Path, default=Path("run.yaml"), metavar="FILE", help="configuration (run.yaml)")
    parser.add_argument("--data-out", type=Path, metavar="FILE", help="data file (OUT with _data before its suffix)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="behind `--`: the command itself")
    options = parser.parse_args(argv)
    if (options.script is None) == (not options.command):
        parser.error("give either --script or the command behind `--`")
    return options


def read_text(options: argparse.Namespace) -> str:
    if options.script is None:
        return shlex.join(word for word in options.command if word != "--")
    try:
        return options.script.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{options.script} cannot be read ({error.strerror}); give the shell script.") from None


def add_sizes(translation: Translation) -> None:
    """Sizes of the language model and the ViT, where their folders can be read on this machine."""
    parts = (
        ("checkpoint.init_llm", "data.tokenizer", LLM_KEYS, "model."),
        ("checkpoint.init_vit", None, VIT_KEYS, "model.vit."),
    )
    for setting, other, keys, prefix in parts:
        folder = translation.settings.get(setting) or translation.settings.get(other)
        if "model.folder" in translation.settings or folder is None:
            continue
        try:
            content = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        content = content.get("vision_config", content) if prefix == "model.vit." else content
        found = {prefix + name: content[key] for name, key in keys.items() if key in content}
        translation.settings |= {name: value for name, value in found.items() if name not in translation.settings}


def nested(settings: dict[str, object]) -> dict:
    """Dotted names -> groups."""
    tree: dict = {}
    for name, value in settings.items():
        *groups, key = name.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[key] = value
    return tree


def write_data(options: argparse.Namespace, config_file: str, translation: Translation) -> None:
    """The data file, if the registry was given; names it in the configuration."""
    if options.dataset_info is None:
        translation.settings["data.dataset_config_file"] = config_file
        translation.notes.append(f"{config_file} was not translated; give --dataset-info data/dataset_info.py.")
        return
    out = options.data_out or options.out.with_name(f"{options.out.stem}_data{options.out.suffix}")
    groups, lost = translate_data(options.dataset_config or Path(config_file), options.dataset_info)
    translation.lost += lost
    if not groups:
        raise CommandError(f"no group of {config_file} has a format that is known here: {lost[0][0]} {lost[0][1]}.")
    out.write_text(yaml.safe_dump(groups, sort_keys=False), encoding="utf-8")
    translation.settings["data.dataset_config_file"] = str(out)
    print(f"wrote {out}: {', '.join(groups)}")


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        command = read_command(read_text(options))
        translation = translate(command)
        add_sizes(translation)
        write_data(options, str(command["dataset_config_file"]), translation)
    except CommandError as error:
        print(error, file=sys.stderr)
        return 1
    options.out.write_text(yaml.safe_dump(nested(translation.settings), sort_keys=False), encoding="utf-8")
    print(f"wrote {options.out}: {len(translation.settings)} settings, {command.gpus} GPUs")
    for title, lines in (
        ("without an equivalent", [f"--{name}: {reason}" for name, reason in translation.lost]),
        ("to look at", translation.notes),
    ):
        if lines:
            print(f"\n{title}:")
            print("\n".join(f"  {line}" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
