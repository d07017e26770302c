"""Learning: pure folds from traces and feedback to outcomes, memories, labels and uplift."""
