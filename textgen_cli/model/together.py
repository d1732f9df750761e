"""Several pieces of work at once, with one voice: threads work, the caller's thread hears what they tell.

So reports and signals stay in one thread. It knows nothing of the work.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")

LINGER = 0.5  # seconds that work which is called off has to leave things in order

Work = Callable[[T, Callable[[Any], None], threading.Event], None]
"""An item, a function to tell things through, and the event after which it ends as soon as it can."""


def each(items: Sequence[T], work: Work[T], workers: int) -> Iterator[Any]:
    """Do the work for all items, at most `workers` at one time; yields what is told, in the order it is told.

    The first failure is raised here; what else is under way is called off, and hardly waited for.
    """
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    called_off = threading.Event()
    if not items:
        return
    pool = ThreadPoolExecutor(min(workers, len(items)), "fetch")
    begun: list[Future[None]] = []
    try:
        begun += [pool.submit(work, item, inbox.put, called_off) for item in items]
        for one in begun:
            one.add_done_callback(inbox.put)
        left = len(items)
        while left:
            told = inbox.get()
            if isinstance(told, Future):
                told.result()
                left -= 1
            else:
                yield told
    finally:
        called_off.set()
        pool.shutdown(wait=False, cancel_futures=True)
        wait(begun, LINGER)
