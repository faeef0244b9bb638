"""What is to be expected: how often nodes fail, and what a training over them will come to.

Pure computation, with numpy and scipy. ``hpcft plan`` plays whole campaigns through
(:mod:`hpcft.foresight.simulator`, many times over in :mod:`hpcft.foresight.forecast`);
``hpcft risk`` estimates failure rates from what is on record (:mod:`hpcft.foresight.rates`).
"""
