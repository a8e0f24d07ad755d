"""Parts of tools/inspect_data.py and tools/index_data.py: what a data file holds, counted and shown."""
