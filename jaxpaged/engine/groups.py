"""A step in parts, so that pipeline stages work at once: while one has a group of rows, another has the next group.

    stage 0    group 0   group 1   group 0   group 1   ...         each group's next step needs its own last tokens
    stage 1              group 0   group 1   group 0   ...         and nothing of the other group's

Groups are dispatched in order, first to last, and share one pool of pages.
"""

from __future__ import annotations

from typing import Any

from jaxpaged.engine.request import Sequence
from jaxpaged.engine.scheduler import Chunk, Plan


class Groups:
    """Which sequence belongs to which group, for one scheduler."""

    def __init__(self, count: int, page_size: int) -> None:
        """As many groups as there are stages."""
        self._count, self._page_size = count, page_size
        self._of: dict[Sequence, int] = {}

    def split(self, plan: Plan) -> list[Plan]:
        """The plan in parts, some perhaps empty; what precedes the step precedes the first that is not.

        A sequence whose last token is still on the device stays in its group, where that token is. Any other may go to
        any, so a new one joins the smallest; but where it reads pages that others fill in this same step, as one does
        that was found to begin like them a moment after, it comes with the last of these or after it.
        """
        if self._count == 1:
            return [plan]
        self._place([*plan.decodes, *plan.chunks])
        for fork in plan.forks:
            self._of[fork.sequence] = self._of[fork.of.sequence]

        def part(group: int) -> Plan:
            def own(planned: Any) -> Any:
                return [one for one in planned if self._of[one.sequence] == group]

            return Plan(own(plan.decodes), own(plan.chunks), own(plan.forks))

        parts = [part(group) for group in range(self._count)]
        first = next((index for index, part in enumerate(parts) if not part.is_empty), 0)
        parts[first] = parts[first]._replace(copies=plan.copies, moves_out=plan.moves_out, moves_in=plan.moves_in)
        return parts

    def _place(self, planned: list[Chunk]) -> None:
        self._of = {s: group for s, group in self._of.items() if not s.finished and s.num_computed_tokens > 0}
        sizes = [0] * self._count
        for group in self._of.values():
            sizes[group] += 1
        for chunk in planned:
            if chunk.sequence not in self._of:
                self._of[chunk.sequence] = smallest = min(range(self._count), key=sizes.__getitem__)
                sizes[smallest] += 1
        movable = [chunk for chunk in planned if chunk.start < len(chunk.sequence.token_ids)]
        filled = {page: self._of[chunk.sequence] for chunk in planned for page in self._filled_by(chunk)}
        has_moved = True
        while has_moved:
            has_moved = False
            for chunk in movable:
                read = chunk.sequence.pages[: chunk.start // self._page_size]
                needed = max((filled[page] for page in read if page in filled), default=0)
                if needed > self._of[chunk.sequence]:
                    self._of[chunk.sequence] = needed
                    filled |= dict.fromkeys(self._filled_by(chunk), needed)
                    has_moved = True

    def _filled_by(self, chunk: Chunk) -> list[int]:
        """The pages that it writes to."""
        end = chunk.start + chunk.length
        return chunk.sequence.pages[chunk.start // self._page_size : -(-end // self._page_size)]
