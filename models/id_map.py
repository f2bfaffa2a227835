"""Which id of a managed table (features.kinds.tables.Managed) has which row, learnt in training and looked up when serving."""

# Shapes: N distinct ids in ascending order, S sets, W rows of a set, A ids without a row, T sets of them.

import torch
from torch import Tensor, nn

from features.fit.encoders import MISSING, UNKNOWN
from features.kinds.tables import Managed

FIRST = UNKNOWN + 1  # row of the first set; those before it are for missing values and for ids without a row
FREE = 0  # an unused row: no value has this id, which stands for missing ones
IN_STEP = torch.iinfo(torch.int64).max  # usage of ids of the current step: never evicted


class IdMap(nn.Module):
    """Which id has which row of a table, or of some sets of it.

    Its entries have the order of the table's rows, and an id's set is a function of the id alone: sets can be sharded over any
    number of ranks without a change of any id's row.

    Args:
        settings: the table's. first, sets: the range of sets that it holds; all by default.
    """

    id_SW: Tensor
    used_SW: Tensor

    def __init__(
        self, settings: Managed, first: int = 0, sets: int | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.settings, self.first = settings, first
        shape = settings.sets if sets is None else sets, settings.ways
        self.register_buffer("id_SW", torch.full(shape, FREE, dtype=torch.int64, device=device))
        # lru: the step in which an id was last seen; lfu: how often it was seen.
        self.register_buffer("used_SW", torch.zeros(shape, dtype=torch.int64, device=device))

    def lookup(self, id_N: Tensor) -> Tensor:
        """row_N of the table; UNKNOWN for an id without a row."""
        set_N, way_N, found_N = self._find(id_N)
        return torch.where(found_N, self._row(set_N, way_N), UNKNOWN)

    def admit(self, id_N: Tensor, count_N: Tensor, step: int) -> Tensor:
        """Records the ids of a step, and assigns rows to new ones by eviction.

        Ids of this step are not evicted. Where a set has fewer other rows than new ids, the largest new ids get no row.
        The host waits for a GPU twice: for the number of new ids, and of those that get a row. Elsewhere what does not count
        is written as a difference of 0.

        Args:
            id_N, count_N: distinct ids, ascending, and how often each was there; MISSING is left out. step: from 1.
        Returns: the rows of the table that belong to another id now.
        """
        set_N, way_N, found_N = self._find(id_N)
        here_N = found_N & (id_N != MISSING)
        used, ways = self.used_SW.view(-1), self.settings.ways
        place_N = set_N * ways + way_N
        before_N = used[place_N]
        used.index_add_(0, place_N, torch.where(here_N, IN_STEP - before_N, 0))
        new_A = (~here_N & (id_N != MISSING)).nonzero().squeeze(1)
        enough_A, place_A = self._least_used(set_N[new_A])
        for slots, value_A in (
            (self.id_SW.view(-1), id_N[new_A]),
            (used, self._seen(used[place_A], count_N[new_A], step)),
        ):
            slots.index_add_(0, place_A, torch.where(enough_A, value_A - slots[place_A], 0))
        used.index_add_(0, place_N, torch.where(here_N, self._seen(before_N, count_N, step) - IN_STEP, 0))
        return FIRST + self.first * ways + place_A[enough_A]

    def _least_used(self, set_A: Tensor) -> tuple[Tensor, Tensor]:
        """Of new ids, ordered by set: whether there is a row for each that no id of this step has, and its place among all.

        The first of a set takes the row of the smallest usage, the second the next.
        """
        sets, ways = self.used_SW.shape
        which_A = (set_A != set_A.roll(1)).cumsum(0)
        which_A = which_A - which_A[:1]
        set_T = set_A.new_zeros(min(len(set_A), sets)).index_copy_(0, which_A, set_A)  # equal where it is written twice
        used_TW = self.used_SW.index_select(0, set_T)
        nth_A = torch.arange(len(set_A), device=set_A.device) - torch.searchsorted(set_A, set_A)
        enough_A = nth_A < (used_TW < IN_STEP).sum(1)[which_A]
        way_A = used_TW.argsort(stable=True)[which_A, nth_A.clamp(max=ways - 1)]
        return enough_A, set_A * ways + way_A

    def _find(self, id_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        set_N = set_of(id_N, self.settings.sets) - self.first
        match_NW = self.id_SW.index_select(0, set_N) == id_N.unsqueeze(1)
        found_N, way_N = match_NW.to(torch.uint8).max(1)  # cheaper than any and argmax
        return set_N, way_N, found_N.bool()

    def _row(self, set_N: Tensor, way_N: Tensor) -> Tensor:
        return FIRST + (self.first + set_N) * self.settings.ways + way_N

    def _seen(self, used_N: Tensor, count_N: Tensor, step: int) -> Tensor:
        return used_N + count_N if self.settings.evict == "lfu" else torch.full_like(used_N, step)


def set_of(id_N: Tensor, sets: int) -> Tensor:
    """The set of each id: sets divide the range of ids, 0 to 2**63 - 1, into equal parts, in its order."""
    return (id_N >> 32) * sets >> 31
