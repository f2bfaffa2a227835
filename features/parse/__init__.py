"""From raw columns to typed rows."""
