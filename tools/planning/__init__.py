"""Parts of plan_parallelism.py: clusters, a pack's work, a layout's memory and time, the search, failures."""
