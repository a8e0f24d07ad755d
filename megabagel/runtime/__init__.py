"""Process groups, devices, random numbers and failure: what every process needs before any model or data.

Importing this package adapts megatron-core to the CPU where there is no CUDA device, before anything imports it.
"""

from megabagel.runtime import cpu_megatron, quiet

quiet.install()
cpu_megatron.install()
