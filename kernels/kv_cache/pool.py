"""Which pages of a cache are taken, and by how many: a free list with reference counts.

A page is free, or held once or more often: a prefix that several requests share is held by each of
them and becomes free when the last one lets go (PagedAttention: Kwon et al., 2023,
arXiv:2309.06180, section 4.4). The pool counts page ids on the host and never touches a tensor; the
same calls give the same ids, and the page that was freed last is taken first.
"""

from __future__ import annotations

from collections.abc import Iterable

from kernels.kv_cache.layout import BlockTable, PagedKV


class OutOfPages(RuntimeError):
    """A pool has fewer free pages than were asked for; nothing was taken."""


class PagePool:
    """The pages 0 .. pages - 1 of one cache."""

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"pages={pages} must be at least 1")
        self._holders = [0] * pages
        self._free = list(range(pages))[::-1]  # a stack: the first to be taken is its end

    @property
    def pages(self) -> int:
        return len(self._holders)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def used_pages(self) -> int:
        return self.pages - self.free_pages

    def holders(self, page: int) -> int:
        """How often a page is held; 0 if it is free."""
        self._check([page])
        return self._holders[page]

    def alloc(self, count: int) -> list[int]:
        """Take `count` free pages.

        Raises:
            OutOfPages: there are not as many; the pool is as before.
            ValueError: count < 0.
        """
        if count < 0:
            raise ValueError(f"count={count} must be at least 0")
        if count > self.free_pages:
            raise OutOfPages(
                f"{count} pages asked for, {self.free_pages} of {self.pages} are free: "
                "free some, or make the cache larger"
            )
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages once more that are already held.

        Raises:
            ValueError: a page that is free or that the pool does not have; nothing was shared.
        """
        pages = self._check(pages)
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"page {page} is free: only a page that is held can be shared")
        for page in pages:
            self._holders[page] += 1

    def free(self, pages: Iterable[int]) -> list[int]:
        """Let go of pages, once for each time they are listed; those that nobody holds any more.

        Raises:
            ValueError: a page is listed more often than it is held, or the pool does not have it;
                nothing was freed.
        """
        pages = self._check(pages)
        listed: dict[int, int] = {}
        for page in pages:
            listed[page] = listed.get(page, 0) + 1
            if listed[page] > self._holders[page]:
                raise ValueError(
                    f"page {page} would be freed {listed[page]} times, "
                    f"but is held {self._holders[page]} times"
                )
        freed = []
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                freed.append(page)
        self._free.extend(freed)
        return freed

    def _check(self, pages: Iterable[int]) -> list[int]:
        pages = list(pages)
        for page in pages:
            if not 0 <= page < self.pages:
                raise ValueError(f"page {page} is out of range: the pool has {self.pages}")
        return pages


def pages_of(table: BlockTable, cache: PagedKV) -> list[list[int]]:
    """The pages that each row of a block table reads, in order: what to give to `PagePool.free`
    when the row is done. Reads the table, so it waits for the GPU."""
    lengths = table.lengths.tolist()
    rows = table.pages.tolist()
    return [row[: -(-length // cache.page)] for row, length in zip(rows, lengths, strict=True)]
