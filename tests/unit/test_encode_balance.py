"""The encode phase on BAGEL's picture sizes stays even up to 64 ranks, which the naive placements do not."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_realistic_mix_of_pictures_is_spread_evenly():
    command = [sys.executable, ROOT / "tools" / "bench_encode_balance.py", "--steps", "3"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ratios = json.loads(output.splitlines()[-1])["ratios"]
    for ranks in (2, 4, 8, 16, 32, 64):
        assert ratios[f"spread, {ranks} ranks"] <= 1.15
        assert ratios[f"spread with frozen ViT, {ranks} ranks"] <= 1.15
    assert ratios["in turn over the first stage, 16 ranks"] > 3
