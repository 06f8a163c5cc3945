"""Who reads the answers of the server: a page that does not may call a few times only, and no picture is made for it."""

from collections import Counter, OrderedDict

MAX_UNREAD = 4  # calls of a page that does not listen
MAX_SILENT = 10_000  # pages that are remembered for that


class Listeners:
    """Which loaded pages listen: those with an open stream of answers or heartbeats; and how often the others have called."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._unread: OrderedDict[str, int] = OrderedDict()

    def __contains__(self, page: str) -> bool:
        """Whether a page listens."""
        return self._open[page] > 0

    def began(self, page: str) -> None:
        """A stream was opened."""
        self._open[page] += 1
        self._unread.pop(page, None)

    def ended(self, page: str) -> None:
        """A stream was closed."""
        self._open[page] -= 1
        if self._open[page] <= 0:
            del self._open[page]

    def may_call(self, page: str) -> bool:
        """Note a call; false if the page has called too often without listening."""
        if page in self:
            return True
        self._unread[page] = self._unread.pop(page, 0) + 1
        if len(self._unread) > MAX_SILENT:
            self._unread.popitem(last=False)
        return self._unread[page] <= MAX_UNREAD
