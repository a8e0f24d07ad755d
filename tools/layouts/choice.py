"""A layout as it is written on the command line, `tp=2,sp,pp=2`, and the table of those that are measured by default.

It imports nothing that needs torch: the program that starts the processes reads it, too.
"""

from dataclasses import dataclass, field

from megabagel.config.checks import check_model
from megabagel.config.checks_parallel import world_faults
from megabagel.config.errors import ConfigError
from megabagel.config.schema import Config, ParallelConfig

SIZES = {  # short name -> field of ParallelConfig
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "und_ranks": "und_expert_ranks",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
}
_SWITCHES = {
    "sp": {"sequence_parallel": True},
    "overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "auto": {"pipeline_split": "auto"},
}
_RECOMPUTE = ("full", "selective")

DEFAULT = (
    "dp",
    "dp,overlap",
    "tp=2",
    "tp=2,sp",
    "tp=4,sp",
    "pp=2",
    "pp=4",
    "pp=2,vp=2",
    "cp=2",
    "cp=4",
    "tp=2,sp,cp=2",
    "tp=2,sp,cp=4",
    "tp=2,sp,pp=2",
    "tp=2,sp,cp=2,pp=2",
    "ep=2",
    "ep=2,overlap",
    "ep=4,und_ranks=1",
    "tp=2,sp,ep=2",
    "dp,experts=4",
    "ep=2,experts=4",
    "ep=4,experts=4",
    "dp,recompute=selective",
    "dp,recompute=full",
    "tp=2,sp,recompute=selective",
)


@dataclass(frozen=True)
class Choice:
    """One layout: its name, fields of ParallelConfig, sparse experts per stream, what is computed again."""

    name: str
    parallel: dict[str, int | bool | str] = field(default_factory=dict)
    experts: int | None = None
    recompute: str | None = None

    @property
    def baseline(self) -> str:
        """The layout of data parallelism alone for the same model."""
        return "dp" if self.experts is None else f"dp,experts={self.experts}"

    def apply(self, config: Config) -> Config:
        """Set the choice's fields in `config` and return it."""
        config.parallel = ParallelConfig(**self.parallel)
        config.model.und_num_experts = config.model.gen_num_experts = self.experts
        config.training.recompute_granularity = self.recompute
        if self.recompute == "selective":
            config.training.recompute_modules = ["core_attn", "mlp", "layernorm"]
        return config


def parse_choice(text: str) -> Choice:
    """`tp=2,sp` and the like -> a Choice. Raises ValueError with one sentence about a part that is not known."""
    parallel: dict[str, int | bool | str] = {}
    experts = recompute = None
    for part in text.split(","):
        name, _, value = part.partition("=")
        if part == "dp":
            continue
        if part in _SWITCHES:
            parallel |= _SWITCHES[part]
        elif name in SIZES and value.isdecimal():
            parallel[SIZES[name]] = int(value)
        elif name == "experts" and value.isdecimal():
            experts = int(value)
        elif name == "recompute" and value in _RECOMPUTE:
            recompute = value
        else:
            allowed = ", ".join(["dp", *_SWITCHES, *(f"{size}=N" for size in SIZES), "experts=N"])
            raise ValueError(
                f"`{part}` in --layout {text} is unknown; allowed are {allowed}, recompute={'|'.join(_RECOMPUTE)}."
            )
    return Choice(text, parallel, experts, recompute)


def check_layout(config: Config, processes: int) -> None:
    """Raise ConfigError with one sentence when `processes` cannot train `config` in its layout."""
    check_model(config)
    for fault in world_faults(config, processes):
        raise ConfigError(fault)
