"""Silences warnings of libraries about themselves that a user of this trainer can do nothing about.

Each row is one message; everything else is still shown.
"""

import warnings

_MESSAGES = (
    "full scope is deprecated",  # megatron-core about its own default of cuda_graph_scope
    "The .grad attribute of a Tensor that is not a leaf",  # its zero_grad looks at the optimizer's shards
    "(Apex|Transformer Engine and Apex|Apex or TE) (is|are) not installed",  # expected on a CPU
    "`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",  # its calls
    "`load_state_dict` is deprecated and will be removed",  # its checkpoint reader, likewise
    "'.*' found in sys.modules after import of package",  # data workers import the program once
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # its linears of whole experts
    "When using (async grad allreduce|sequence parallelism) it is recommended",  # what `distributed` does on GPUs
)


def install() -> None:
    """Add the filters; must run before megatron-core is imported."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
