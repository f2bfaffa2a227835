"""A managed table's map of ids, as its documentation has it: one id at a time, in plain Python."""

from features.kinds.tables import Managed


class ReferenceIdMap:
    """Of each set a list of [id, used], one for each of its rows; id None where nobody has the row."""

    def __init__(self, managed: Managed) -> None:
        self.policy, self.ways = managed.evict, managed.ways
        self.sets: list[list[list]] = [[[None, 0] for _ in range(managed.ways)] for _ in range(managed.sets)]

    def set_of(self, id: int) -> int:
        return (id >> 32) * len(self.sets) // (1 << 31)

    def row(self, id: int) -> int:
        number = self.set_of(id)
        ids = [known for known, _ in self.sets[number]]
        return 2 + number * self.ways + ids.index(id) if id in ids else 1

    def admit(self, counts: dict[int, int], step: int) -> set[int]:
        """As the documentation of a managed table has it, for the ids of one step; returns the rows that changed hands."""
        known = [id for id in counts if self.row(id) != 1]
        for id in known:
            slot = next(slot for slot in self.sets[self.set_of(id)] if slot[0] == id)
            slot[1] = slot[1] + counts[id] if self.policy == "lfu" else step
        changed = set()
        for id in sorted(counts.keys() - set(known)):
            left = [slot for slot in self.sets[self.set_of(id)] if slot[0] not in counts]
            if not left:
                continue
            slot = min(left, key=lambda slot: slot[1])  # the first of the least
            slot[:] = [id, slot[1] + counts[id] if self.policy == "lfu" else step]
            changed.add(self.row(id))
        return changed
