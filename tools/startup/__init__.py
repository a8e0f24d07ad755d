"""What `bench_startup.py` runs on its ranks and how it counts bytes."""
