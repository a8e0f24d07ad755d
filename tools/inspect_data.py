"""Shows what a data file holds and what the model gets of it: counts, token histograms, packing, bad rows, whole packs.

    python tools/inspect_data.py --config demo --html data.html
    python tools/inspect_data.py --data data.yaml --tokenizer models/BAGEL-7B-MoT --packs 4 --html data.html --strict
    python tools/inspect_data.py --data data.yaml --tokenizer models/BAGEL-7B-MoT --data.max_num_tokens 16384

No weights are needed: the shape of the model comes from the settings, BAGEL-7B where they say nothing. Any other
setting of a run (--group.key VALUE) can be given too. Rows are measured without decoding pictures; those of the packs
in the page are read as in training.
"""

import argparse
import os
import sys
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

from inspection import page  # noqa: E402
from inspection.packs_view import view  # noqa: E402
from inspection.subject import Subject, open_subject  # noqa: E402
from inspection.survey import GroupSurvey, num_rows, survey  # noqa: E402
from inspection.ways import WAYS, Way, draw, try_way  # noqa: E402
from tqdm import tqdm  # noqa: E402

from megabagel.data.faults import DataError  # noqa: E402
from megabagel.data.steps import EndOfData  # noqa: E402
from megabagel.packing import native  # noqa: E402

PACKS_TRIED = 128  # of each way of packing, at least
MOST_DRAWS = 50_000
LISTED = 20  # bad rows in the terminal


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[], help="settings of a run: a file or a preset")
    parser.add_argument("--data", help="data file (default: data.dataset_config_file of the settings)")
    parser.add_argument("--tokenizer", help="folder of the tokenizer (default: that of the settings)")
    parser.add_argument("--samples", type=int, help="rows of each group to measure (default: all)")
    parser.add_argument("--html", type=Path, help="write a page with everything to this file")
    parser.add_argument("--packs", type=int, default=2, help="packs that the page shows (default: 2)")
    parser.add_argument("--processes", type=int, default=1, help="processes that measure rows")
    parser.add_argument("--strict", action="store_true", help="exit with code 1 when a row or file is bad")
    options, settings = parser.parse_known_args(arguments)
    try:
        subject = open_subject([*_settings(options), *settings])
        surveys = _survey(subject, options)
        ways = _ways(subject, surveys)
        strategy = subject.config.data.packing
        print("\n".join(page.report(surveys, ways, strategy, LISTED)))
        if options.html is not None:
            _write_page(options, subject, surveys, ways)
            print(options.html)
    except (ValueError, OSError) as error:  # ConfigError and DataError are ValueErrors
        print(f"inspect_data: {error}", file=sys.stderr)
        return 2
    return 1 if options.strict and page.all_faults(surveys) else 0


def _settings(options: argparse.Namespace) -> list[str]:
    given = [word for file in options.config for word in ("--config", file)]
    given += ["--data.dataset_config_file", options.data] if options.data else []
    return given + (["--data.tokenizer", options.tokenizer] if options.tokenizer else [])


def _survey(subject: Subject, options: argparse.Namespace) -> list[GroupSurvey]:
    total = num_rows(subject.maker, options.samples)
    with tqdm(total=total, unit=" rows", desc="measuring", disable=None) as bar:
        return survey(
            subject.maker,
            subject.costs,
            most_rows=options.samples,
            processes=options.processes,
            progress=bar.update,
        )


def _ways(subject: Subject, surveys: list[GroupSurvey]) -> list[Way]:
    """Nothing where no sample can be used, or the planner in C++ is not built."""
    lengths = [found.tokens.tolist() for found in surveys]
    usable = [n for tokens in lengths for n in tokens]
    if native.PLANNER is None or not usable:
        return []
    wanted = PACKS_TRIED * subject.limits.max_num_tokens * len(usable) // sum(usable)
    draws = subject.draws(min(max(wanted, 2000), MOST_DRAWS))
    drawn = draw(draws, lengths, [found.column("cost").tolist() for found in surveys])
    mandatory = [group for group in subject.mandatory if lengths[group]]
    return [try_way(strategy, subject.limits, drawn, mandatory) for strategy in WAYS] if drawn.tokens else []


def _write_page(options: argparse.Namespace, subject: Subject, surveys: list[GroupSurvey], ways: list[Way]) -> None:
    views, note = [], ""
    shift = subject.config.model.timestep_shift
    try:
        for pack in subject.packs(options.packs):
            parts = [subject.parts(key) for key in pack.keys]
            views.append(view(pack, parts, subject.tokenizer, shift))
    except (DataError, EndOfData) as error:
        note = f" No pack is shown: {error}"
    data = subject.config.data
    subtitle = (
        f"{data.dataset_config_file}, tokenizer {subject.tokenizer.folder}, {data.packing} packing up to "
        f"{data.max_num_tokens:,} tokens, seed {data.seed}, {datetime.now():%Y-%m-%d %H:%M}.{note}"
    )
    title = f"Data of {Path(data.dataset_config_file).name}"
    weights = list(subject.weights.values())
    content = page.render(title, subtitle, surveys, weights, ways, data.packing, views)
    part = options.html.with_name(f"{options.html.name}.part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, options.html)


if __name__ == "__main__":
    sys.exit(main())
