"""What a trained model rests on: features by permutation, and tasks by each other."""
