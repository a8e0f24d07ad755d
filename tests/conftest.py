"""What holds for all tests: one thread per process, for several share few cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
