"""Faults on purpose: a run is harmed by a schedule, and judged by what it did about it.

``hpcft chaos`` reads or draws a schedule (:mod:`hpcft.chaos.schedule`), and has each fault done by
a process of its own on the host concerned, a hand (:mod:`hpcft.chaos.hand`), that undoes it again
whatever happens. What the run did follows from its events (:mod:`hpcft.chaos.verdict`).
"""
