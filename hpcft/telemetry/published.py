"""How often nodes fail, before any has been seen to fail: what others have published.

The publications are read as docs/foresight.md says. Clusters differ by a factor of six.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import geometric_mean


@dataclass(frozen=True)
class Published:
    """One cluster, or one training.

    node_hours: for each failure, of nodes of eight GPUs.
    """

    name: str
    source: str
    node_hours: float


RATES = (
    # 105 restarts of 124 nodes in 60 days: at least 35 by hand, and some 70 automatic ones.
    Published("OPT-175B", "Zhang et al. 2022, arXiv:2205.01068", 124 * 60 * 24 / 105),
    # 6.50 and 2.34 in a thousand node-days.
    Published("Meta RSC-1", "Kokolis et al. 2025, arXiv:2410.21680", 24_000 / 6.50),
    # 1 to 2 a week on 48 nodes.
    Published("BLOOM", "Bekman 2022, The Technology Behind BLOOM Training", 48 * 7 * 24 / 1.5),
    # 419 in 54 days on 2048 nodes.
    Published("Llama 3", "Grattafiori et al. 2024, arXiv:2407.21783", 2048 * 54 * 24 / 419),
    Published("Meta RSC-2", "Kokolis et al. 2025, arXiv:2410.21680", 24_000 / 2.34),
)
#: What is taken for the rate of a node of which nothing is known: one failure in so many hours.
NODE_HOURS = geometric_mean(one.node_hours for one in RATES)
