"""What is fitted on the train split: statistics and encoders."""
