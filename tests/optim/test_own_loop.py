"""GR without a trainer: the loop of the docs on one process. On two: `test_distributed.py`."""

import torch

from helpers import own_loop


def test_the_loop_equals_its_reference():
    found = own_loop.run_block()
    expected = own_loop.make_model()
    weights = own_loop.reference([found["batches"]], expected)
    # The generator goes on as if there had been no second passes, and the statistics are those of the first.
    assert torch.equal(found["rng_state"], torch.get_rng_state())
    assert own_loop.relative_error(found["weights"], weights) < 1e-13
    torch.testing.assert_close(found["buffers"], own_loop.flat(expected.buffers()), rtol=1e-12, atol=0)
