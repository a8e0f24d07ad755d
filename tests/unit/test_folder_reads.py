"""What of a safetensors folder is in a process's memory: the slice that was asked for, and no page of the file."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from megabagel.checkpoint.sources import SafetensorsFolder

MIB = 2**20


def resident_of_files() -> int:
    return int(re.search(r"RssFile:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def test_every_slice_equals_the_library_s_and_maps_nothing(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(5000, 2048, generator=draw),  # 40 MB, read by columns in several steps
        "half": torch.randn(7, 6, 5, generator=draw).bfloat16(),
        "vector": torch.randn(9, generator=draw),
        "scalar": torch.tensor(3.0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    before = resident_of_files()
    for name, whole in tensors.items():
        shape = tuple(whole.shape)
        assert folder.shape(name) == shape and folder.dtype(name) == whole.dtype
        assert torch.equal(folder.read(name, shape, None, 0, 0), whole)
        for dim in range(min(2, whole.dim())):
            part = folder.read(name, shape, dim, 2, shape[dim] - 1)
            assert torch.equal(part, whole.narrow(dim, 2, shape[dim] - 3)) and part.is_contiguous()
    assert resident_of_files() - before < 2 * MIB
