"""Cases shared among processes by leases in the results folder: of one launch, or of several that know nothing of each
other but the folder. Each takes the next case that no other has; of one that dies, others take over its cases alone."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

from ..system import storage
from ..system.errors import InputError
from ..system.lease import Leases
from .files import writing


class SharedCases(contextlib.AbstractContextManager):
    """What is left to draw of a folder's cases, by any process.

    :param todo: {number: name} of the cases, in the order in which this process would take them.
    :param is_complete: whether the results of case i are there.
    :param timeout: seconds without renewal after which another process counts as gone.
    :param settings: a word for all that decides the masks; processes that draw others are refused.
    """

    def __init__(self, folder: storage.AnyPath, todo: Mapping[int, str], is_complete: Callable[[int], bool],
                 timeout: float, settings: str):
        self.folder, self.is_complete = folder, is_complete
        self.left = dict(todo)
        self.leases = Leases(timeout, doing=settings)
        self._mine: set[int] = set()
        self._returned = threading.Event()  # set when a case was given back

    def path(self, name: str) -> str:
        """Of the lease of a case, a volume, or the scores."""
        return storage.join(self.folder, f".{name}.lease")

    def take(self) -> Iterator[int]:
        """The cases that no other process has or has drawn, each leased when it is asked for.

        :raises InputError: if a process with other flags draws into the folder.
        """
        for i, name in [*self.left.items()]:
            if i in self._mine or not self.take_lease(name):
                continue
            if self.is_complete(i):
                del self.left[i]
                self.leases.give_back(self.path(name))
            else:
                self._mine.add(i)
                yield i

    def take_lease(self, name: str) -> bool:
        """Whether a lease could be taken.

        :raises InputError: if a process with other flags has it, or it cannot be written.
        """
        path, me = self.path(name), self.leases.me
        with writing(path):
            holder = self.leases.take(path)
        alive = holder and (holder.machine == me.machine or self.leases.renewed(path))
        if alive and holder.generation and holder.doing != me.doing:
            raise InputError(f"--results_dir {self.folder}: {holder} draws other masks into it, with other flags,"
                             f" weights or another seed; give another folder, or wait for it")
        return holder is None

    def finish(self, i: int, write: Callable[[], None]) -> None:
        """Write the results of a case that was taken, unless another process has taken over, and give it back."""
        path = self.path(self.left[i])
        if self.leases.holds(path):
            write()
            del self.left[i]
        self.leases.give_back(path)
        self._mine.discard(i)
        self._returned.set()

    def drop(self, i: int) -> None:
        """Leave a case to others, which this process cannot read."""
        self.leases.give_back(self.path(self.left.pop(i)))
        self._mine.discard(i)

    def clean(self, names: Iterable[str]) -> None:
        """Remove what dead processes have left: parts of files, and leases of cases and volumes, whose results are
        there."""
        storage.remove_partial(self.folder)
        for path in {self.path(name).rpartition("/")[2] for name in names} & storage.names_in(self.folder):
            with contextlib.suppress(OSError):
                storage.remove(storage.join(self.folder, path))

    def wait(self) -> None:
        """Wait until it may be worth to try again."""
        self._returned.wait(self.leases.interval / 5)
        self._returned.clear()

    def __exit__(self, *exception: object) -> None:
        self.leases.close()
