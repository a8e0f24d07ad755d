"""Parts of tools/bench_packing.py: the samples it packs, and the baseline it measures against."""
