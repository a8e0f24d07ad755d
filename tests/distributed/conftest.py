"""The pool of worker processes that the layout tests share."""

from collections.abc import Iterator

import pytest

from tests.distributed.layouts import faults
from tests.distributed.layouts.pool import Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Eight workers that have met once."""
    pool = Pool(8)
    pool.run(faults.nothing, processes=8, limit=120)
    yield pool
    pool.close()
