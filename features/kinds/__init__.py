"""Feature kinds: one file each, registered in KINDS."""

from features.kinds.bag import Bag
from features.kinds.base import Feature
from features.kinds.categorical import Categorical
from features.kinds.dense import Dense
from features.kinds.vector import Vector

# By section of a schema, in the order of a dataset's columns and of a model's inputs. New kinds come last.
KINDS: dict[str, type[Feature]] = {kind.section: kind for kind in (Dense, Categorical, Bag, Vector)}
