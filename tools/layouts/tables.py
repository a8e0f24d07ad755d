"""From the ranks' reports to Markdown tables and ratios, the formulas beside what was measured."""

from collections.abc import Callable
from dataclasses import replace

from layouts.activation_formula import held
from layouts.choice import Choice
from layouts.memory_formula import Memory, memory, memory_of_ranks
from layouts.traffic_formula import traffic
from layouts.workload import LOAD, small_config

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "p2p", "broadcast")
STATE = ("parameters", "gradients", "optimizer", "average")
Reports = dict[str, list[dict]]  # layout -> report of each rank, see program.RankReport


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2f}"


def spread(values: list[float]) -> str:
    """The largest value, and the smallest one where it differs."""
    high, low = megabytes(max(values)), megabytes(min(values))
    return high if high == low else f"{high} ({low})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def peak_table(reports: Reports, formula: Callable[[str], tuple[float, float]]) -> str:
    """MB of the fullest rank, measured and by formula: what forward and backward add at their peak, and with the state.

    `formula` gives both of a layout. Errors are those of the formula.
    """
    rows = []
    for name, ranks in reports.items():
        added = max(rank["peak"] for rank in ranks)
        whole = max(rank["peak"] + sum(rank[kind] for kind in STATE) for rank in ranks)
        cells = []
        for measured, expected in zip((added, whole), formula(name), strict=True):
            cells += [megabytes(measured), megabytes(expected), f"{100 * (expected / measured - 1):+.1f}%"]
        rows.append([f"`{name}`", *cells])
    return table(["layout", "step's peak", "formula", "error", "with state", "formula", "error"], rows)


def memory_table(reports: Reports, formula: Callable[[str], Memory]) -> str:
    """MB per rank; `formula` gives the expected state of a layout's fullest rank."""
    rows = []
    for name, ranks in reports.items():
        cells = [spread([rank[kind] for rank in ranks]) for kind in STATE]
        measured = max(sum(rank[kind] for kind in STATE) for rank in ranks)
        rows.append(
            [f"`{name}`", *cells, megabytes(measured), megabytes(formula(name).total),
             spread([rank["activations"] for rank in ranks])]
        )  # fmt: skip
    head = ["layout", "weights", "gradients", "optimizer", "EMA", "sum", "formula", "activations"]
    return table(head, rows)


def traffic_table(reports: Reports, formula: Callable[[str], dict[str, float]]) -> str:
    """MB per step of the rank that sends most of a kind, the formula's value after a slash where there is one."""
    kinds = [kind for kind in KINDS if any(rank["sent"].get(kind) for ranks in reports.values() for rank in ranks)]
    rows = []
    for name, ranks in reports.items():
        expected = formula(name)
        cells = []
        for kind in kinds:
            sent = max(rank["sent"].get(kind, 0) for rank in ranks)
            cells.append(megabytes(sent) + (f" / {megabytes(expected[kind])}" if kind in expected else ""))
        encode = max(sum(rank["encode_sent"].values()) for rank in ranks)
        rows.append([f"`{name}`", *cells, megabytes(encode)])
    return table(["layout", *kinds, "encode phase"], rows)


def mlp_table(reports: Reports, names: list[str]) -> str:
    """MB of the decoder's MLPs on the fullest rank (emptiest rank); of optimizer state the mean over ranks."""
    rows = []
    for name in names:
        ranks = reports[name]
        state = sum(rank["mlp_optimizer"] for rank in ranks) / len(ranks)
        cells = [spread([rank[f"mlp_{kind}"] for rank in ranks]) for kind in ("parameters", "gradients")]
        rows.append([f"`{name}`", *cells, megabytes(state)])
    return table(["layout", "MLP weights", "MLP gradients", "MLP optimizer, mean"], rows)


def formulas(choices: dict[str, Choice], processes: int, packs: int) -> tuple[Callable, Callable, Callable]:
    """Expected state, peaks (of a step, with state) and traffic of the measured model by layout name."""
    load = replace(LOAD, packs=packs)

    def expected_memory(name: str) -> Memory:
        config = choices[name].apply(small_config())
        return memory(config.model, config.parallel, processes)

    def expected_traffic(name: str) -> dict[str, float]:
        return traffic(choices[name].apply(small_config()), processes, load)

    def expected_peaks(name: str) -> tuple[float, float]:
        config = choices[name].apply(small_config())
        config.training.global_batch_size = packs
        added = [one for stage in held(config, processes, load) for one in stage]
        state = [one for stage in memory_of_ranks(config.model, config.parallel, processes) for one in stage]
        whole = max(a.total + s.total for a, s in zip(added, state, strict=True))
        return max(one.total for one in added), whole

    return expected_memory, expected_peaks, expected_traffic


def ratios(reports: Reports, choices: dict[str, Choice]) -> dict[str, float]:
    """Fullest rank's state, activations and sent bytes over those of data parallelism alone, per layout."""
    values = {}
    for name, ranks in reports.items():
        base = reports[choices[name].baseline]
        if ranks is base:
            continue
        for label, of in (
            ("state", lambda rank: sum(rank[kind] for kind in STATE)),
            ("mlp_state", lambda rank: rank["mlp_parameters"] + rank["mlp_gradients"]),
            ("activations", lambda rank: rank["activations"]),
            ("sent", lambda rank: sum(rank["sent"].values())),
        ):
            if (size := max(map(of, base))) > 0:  # one process sends nothing
                values[f"{name}: {label}"] = round(max(map(of, ranks)) / size, 4)
    return values
