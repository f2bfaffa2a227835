"""AutoMTL's search space: operations, blocks that choose among them, and the architecture that is found."""
