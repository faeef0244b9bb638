"""Which mode it is."""

from __future__ import annotations

from hpcft.errors import HpcftError
from hpcft.train.dealing import Dealing
from hpcft.train.health import Health
from hpcft.train.lasting import Lasting
from hpcft.train.modes.asynchronous import Asynchronous
from hpcft.train.modes.backup import Backup
from hpcft.train.modes.local_sgd import LocalSgd
from hpcft.train.modes.strategy import Strategy
from hpcft.train.modes.sync import Sync
from hpcft.train.process_group import WorldProcessGroup
from hpcft.train.replica import Replica


def choose(
    lasting: Lasting,
    group: WorldProcessGroup,
    replica: Replica,
    health: Health,
    dealing: Dealing,
) -> Strategy:
    """What does as the user has chosen.

    Raises
    ------
    HpcftError: the state cannot be trained so.
    """
    mode, world, checkpoints = lasting.session.mode, lasting.session.world, lasting.checkpoints
    if mode.own_gradients and replica.state.sharded():
        raise HpcftError(
            f"--mode {mode.name} needs all of the state in each rank, and this one is sharded",
            "leave --mode away, or train with DistributedDataParallel",
        )
    if mode.name == "backup":
        return Backup(group, world, replica, checkpoints, health, dealing.sampler)
    if mode.name == "local-sgd":
        return LocalSgd(group, world, replica, checkpoints, mode, health)
    if mode.name == "async":
        return Asynchronous(group, replica, lasting, health, dealing)
    return Sync(group, world, replica, checkpoints)
