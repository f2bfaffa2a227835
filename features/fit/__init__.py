"""Statistics of rows, and encoders fitted on those of the train split."""
