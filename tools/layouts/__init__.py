"""Parts of measure_layouts.py: the small model and its packs, what is counted on a rank, and the formulas beside it."""
