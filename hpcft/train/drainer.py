"""A process beside a parked spare that writes the ranks' checkpoints for them.

Run by :mod:`hpcft.world.rank` in place of the script. Now and then a checkpoint that the ranks have
saved near them is gathered on this node; it is written to --ckpt-dir (:mod:`hpcft.ckpt.drain`) and
told of, so that rank 0 commits it. That goes on until the process is killed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NoReturn

from hpcft.ckpt import drain
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.drain import DrainShelf
from hpcft.ckpt.index import Damaged
from hpcft.ckpt.near import NearStore
from hpcft.ckpt.policy import Policy
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.save import SaveFailed, Saver
from hpcft.ckpt.store import Store
from hpcft.world import bystander
from hpcft.world.bystander import Bystander

#: Seconds between two looks at what has been gathered.
_LOOK = 0.2


def serve(me: Bystander) -> NoReturn:
    """Write what is gathered, for as long as this process lives."""
    policy = Policy.of(me.options["checkpoints"])
    gathered = NearStore(Path(me.options["gathered"]))
    # In place of all ranks, which could write so much together.
    engine = Engine(policy.memory, bandwidth=policy.bandwidth * me.size)
    shelf = DrainShelf(Store(Path(policy.directory)))
    saver = Saver(shelf, Alone(), engine, policy.timeout, policy.layout)
    while True:
        folder = drain.newest(gathered)
        if folder is None:
            time.sleep(_LOOK)
            continue
        name, began = folder.parent.name, time.monotonic()
        try:
            save = drain.drain(folder, saver)
        except (Damaged, SaveFailed) as error:
            me.link.send("undrained", checkpoint=name, why=error.message)
        except OSError as error:
            me.link.send("undrained", checkpoint=name, why=str(error))
        else:
            seconds = round(time.monotonic() - began, 6)
            where = save.folder.name
            me.link.send("drained", checkpoint=name, folder=where, step=save.step, seconds=seconds)
        # Whatever has become of it: there will be others, and it takes memory.
        gathered.clear_up_to(name)


if __name__ == "__main__" and (present := bystander.present()):
    serve(present)
